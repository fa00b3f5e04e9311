// How kernels share out tensors of images, channels and positions where threads sum over a channel: group_norm_act and
// bias_act.
//
// A line is what one thread's accesses run along: channels last, the kWide channels of one access, over the positions;
// contiguous, a channel (kWide = 1). An item is one access to it, of kVec elements. A block has a bundle of channels of
// one image and some of their items; as many threads as fit share a line, its lanes.
#pragma once

#include "cuda/common.cuh"

namespace fastgen {

struct Plan {
  int channels;
  int bundle;          // channels of a block; the last block may have fewer
  int bundles, parts;  // blocks side by side along the channels and along the items
  bool columns;        // channels last
  bool vectors;        // all tensors begin at multiples of 16 bytes; how they are read, and no bit, depends on it
  int64_t positions;
  int64_t items;  // of a line
  int64_t share;  // items of a block; the last block may have fewer
};

// A thread's place in a plan. Threads that have none take part in barriers only.
template <int kVec, int kWide>
struct Place {
  int64_t image;
  int64_t first, end;          // this thread's items are first, first + lanes, … < end
  int first_channel, channel;  // the block's and the thread's
  int part, count;             // the block's rank along the items, and its channels
  int line, lane, lanes;
  int apart;  // threads from one lane to the next
  __device__ explicit Place(const Plan& p) {
    const int rest = static_cast<int>(blockIdx.x) / p.parts, n = rest / p.bundles;
    part = static_cast<int>(blockIdx.x) % p.parts;
    image = n;
    first_channel = rest % p.bundles * p.bundle;
    count = std::min(p.bundle, p.channels - first_channel);
    const int64_t begin = part * p.share;
    end = std::min(begin + p.share, p.items);
    const int lines = count / kWide, thread = static_cast<int>(threadIdx.x);
    lanes = kThreads / lines;
    apart = p.columns ? lines : 1;
    line = p.columns ? thread % lines : thread / lanes;
    lane = p.columns ? thread / lines : thread % lanes;
    first = begin + lane;
    if (line >= lines || lane >= lanes) {
      line = 0;
      lane = lanes;
      first = end;
    }
    channel = first_channel + line * kWide;
  }
  // Positions of a channel that fall to the block of a rank.
  static __device__ int64_t positions(const Plan& p, int rank) {
    const int64_t items = std::min(p.share, p.items - rank * p.share);
    return items > 0 ? items * (kVec / kWide) : 0;
  }
};

// Where a line starts in memory, and how far its items lie apart.
template <typename P>
struct Line {
  P* at;
  int64_t step;
  bool vectors;
};

// The line of a channel in x, or in cat(x, skip), of whose channels so many are x's.
template <int kVec, typename P>
__device__ Line<P> line_of(const Plan& p, int64_t image, int channel, P* x, P* skip, int early) {
  const bool late = channel >= early;
  const int64_t channels = late ? p.channels - early : early, c = late ? channel - early : channel;
  P* base = (late ? skip : x) + image * channels * p.positions;
  return p.columns ? Line<P>{base + c, channels, p.vectors} : Line<P>{base + c * p.positions, kVec, p.vectors};
}
template <int kVec, typename P>
__device__ Line<P> line_of(const Plan& p, int64_t image, int channel, P* x) {
  return line_of<kVec, P>(p, image, channel, x, nullptr, p.channels);
}

template <int kVec, typename T>
__device__ __forceinline__ Pack<T, kVec> get(const Line<const T>& from, int64_t item) {
  const T* p = from.at + item * from.step;
  if constexpr (kVec > 1) {
    if (!from.vectors) {
      Pack<T, kVec> pack;
#pragma unroll
      for (int j = 0; j < kVec; ++j) pack.v[j] = p[j];
      return pack;
    }
  }
  return *reinterpret_cast<const Pack<T, kVec>*>(p);
}
template <typename T, int kVec>
__device__ __forceinline__ void put(const Line<T>& to, int64_t item, const Pack<T, kVec>& pack) {
  T* p = to.at + item * to.step;
  if constexpr (kVec > 1) {
    if (!to.vectors) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) p[j] = pack.v[j];
      return;
    }
  }
  *reinterpret_cast<Pack<T, kVec>*>(p) = pack;
}

// Calls f(item, packs) for a thread's items, one pack a source, while the next two accesses are under way.
template <typename T, int kVec, int kWide, int kSources, typename F>
__device__ void stream(const Place<kVec, kWide>& at, const Line<const T> (&from)[kSources], const F& f) {
  Pack<T, kVec> ahead[2][kSources], now[kSources];
  const auto load = [&](int64_t i, Pack<T, kVec>(&to)[kSources]) {
    if (i >= at.end) return;
#pragma unroll
    for (int k = 0; k < kSources; ++k) to[k] = get<kVec>(from[k], i);
  };
  load(at.first, ahead[0]);
  load(at.first + at.lanes, ahead[1]);
#pragma unroll 1
  for (int64_t i = at.first; i < at.end; i += at.lanes) {
#pragma unroll
    for (int k = 0; k < kSources; ++k) {
      now[k] = ahead[0][k];
      ahead[0][k] = ahead[1][k];
    }
    load(i + 2 * at.lanes, ahead[1]);
    f(i, now);
  }
}

// The sums over the lanes of each line, in a fixed order, in the sum of lane 0. scratch: [kCount, kThreads], shared;
// the caller synchronises before it is used again.
template <int kCount, int kVec, int kWide, typename W>
__device__ void fold_lanes(const Place<kVec, kWide>& at, W (&sum)[kCount], W* scratch) {
  W* own = scratch + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) own[j * kThreads] = sum[j];
  for (int n = at.lanes; n > 1;) {
    const int half = (n + 1) / 2;
    __syncthreads();
    if (at.lane < n - half) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) own[j * kThreads] = sum[j] += own[j * kThreads + half * at.apart];
    }
    n = half;
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bundles of about so many bytes of x, of whole units of channels and, channels last, of rows of some bytes; all of
// nearly one size. False where a unit is more than `most` channels.
inline bool cut(Plan& p, int unit, int most, int64_t element, int64_t bytes, int64_t row) {
  if (unit > most) return false;
  const int64_t wanted = std::max(divide_up(bytes, p.positions * element), p.columns ? divide_up(row, element) : 1);
  const int64_t units = divide_up(p.channels, unit);
  const int64_t bundles = divide_up(units, std::min<int64_t>(divide_up(wanted, unit), most / unit));
  p.bundle = static_cast<int>(divide_up(units, bundles)) * unit;
  p.bundles = static_cast<int>(divide_up(p.channels, p.bundle));
  return true;
}

// A plan in which every block has about 32 KiB of x, whatever channels they belong to.
inline Plan spread(Plan p, int vec, int wide, int64_t element) {
  constexpr int64_t kChunk = 32 * 1024, kRow = 512;
  p.items = p.columns ? p.positions : p.positions / vec;
  cut(p, wide, kThreads * wide, element, kChunk, kRow);
  p.share = std::min(p.items, std::max<int64_t>(1, kChunk / (element * vec) / (p.bundle / wide)));
  p.parts = static_cast<int>(divide_up(p.items, p.share));
  return p;
}

inline dim3 blocks(int64_t images, const Plan& p) { return dim3(static_cast<unsigned>(images * p.bundles * p.parts)); }

// Calls f(zero of x's type, kVec, kWide), the latter two as integral_constants, with the widest accesses that the sizes
// allow; channels last every source has a multiple of `whole` channels.
template <typename F>
void for_accesses(const Tensor& x, const char* op, const Plan& p, int whole, const F& f) {
  for_dtype(x, op, [&](auto zero) {
    constexpr int kVec = sizeof(zero) == 8 ? 1 : 16 / sizeof(zero);  // fp64 is for proofs: fewer kernels to compile
    using One = std::integral_constant<int, 1>;
    using Vec = std::integral_constant<int, kVec>;
    if ((p.columns ? whole : p.positions) % kVec != 0) return f(zero, One{}, One{});
    if (p.columns) return f(zero, Vec{}, Vec{});
    return f(zero, Vec{}, One{});
  });
}

}  // namespace fastgen
