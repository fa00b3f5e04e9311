// group_norm_act: y = act((xhat w + b)(1 + scale) + shift), forward and backward; see fastgen/ops/group_norm_act.py.
//
// One block reads a bundle of whole groups of an image into shared memory and has everything it needs: x is read once.
// Where a bundle is large, the blocks of a cluster share it, each with its positions, and read one another's sums
// (compute capability 9.0 on). What fits no cluster's memory is split: every block leaves the statistics of its part in
// a slot of its own, a second kernel combines them, a third writes the result. The shape of one image decides, every
// sum has a fixed order, and nothing is added atomically: an image gives the same bits in any batch.
//
// Statistics are centred: each channel of a block about its own mean, then pooled about the group's (Chan, Golub &
// LeVeque 1979). The backward needs two sums of each channel, S1 = sum dz and S2 = sum dz (x - mean), where
// z = (x - mean) rstd a + d is made again from x: with k1 = rstd mean(a dz) and k2 = rstd³ mean(a dz (x - mean)), means
// over the group, dx = rstd a dz - k1 - (x - mean) k2.
//
// Least traffic, e bytes an element, E = N C S elements: forward 2 e E, backward 3 e E; split 3 e E and 5 e E, less
// what the L2 cache still has of the first reading. On an H200 (4.8 TB/s), for 64 MB of bf16 (E = 32 M): 28 µs forward,
// 42 µs backward, split 42 and 70. Arithmetic, SiLU: some 20 instructions an element forward and 45 backward, which at
// 132 SMs x 128 lanes x 1.8 GHz are 22 µs and 50 µs: in half precision the forward is near both limits and the backward
// is bound by its instructions, hence the short exponential of activate() there.
#include <torch/csrc/stable/ops.h>

#include <numeric>

#include "common/activations.h"
#include "cuda/cluster.cuh"
#include "cuda/lines.cuh"

namespace fastgen {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int64_t kPart = 16 * 1024;   // bytes of x that a block takes, where it has the choice
constexpr int64_t kRow = 64;           // bytes side by side, channels last: what memory moves at least
constexpr int64_t kClusterPart = 96 * 1024;  // shared memory of a cluster's block at most, so that two fit on one SM

struct GroupPlan : Plan {
  int early;          // channels of x; skip has the others
  int common;         // what both have a multiple of
  int width, groups;  // channels of a group, groups
};

template <typename W>
struct Parameters {
  const W *weight, *bias;  // [C] or null
  const W *scale, *shift;  // [N, C] or null
};

// a = w (1 + scale) of one channel; d = b (1 + scale) + shift
template <typename W>
__device__ W gain(const Parameters<W>& p, int channels, int64_t image, int c) {
  const W a = p.weight != nullptr ? p.weight[c] : W(1);
  return p.scale != nullptr ? a * (W(1) + p.scale[image * channels + c]) : a;
}
template <typename W>
__device__ W offset(const Parameters<W>& p, int channels, int64_t image, int c) {
  W d = p.bias != nullptr ? p.bias[c] : W(0);
  if (p.scale != nullptr) d *= W(1) + p.scale[image * channels + c];
  return p.shift != nullptr ? d + p.shift[image * channels + c] : d;
}

// z = (x - mean) a + d for a thread's channels; rstd is in a.
template <int kWide, typename W>
struct Affine {
  W mean[kWide], a[kWide], d[kWide];
};
template <int kVec, int kWide, typename W>
__device__ Affine<kWide, W> affine(const GroupPlan& p, const Place<kVec, kWide>& at, const Parameters<W>& given) {
  Affine<kWide, W> to;
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    to.a[j] = gain(given, p.channels, at.image, at.channel + j);
    to.d[j] = offset(given, p.channels, at.image, at.channel + j);
  }
  return to;
}
// Completes it from statistics in memory, mean and rstd of the groups from that of channel first on.
template <int kWide, typename W>
__device__ void with_statistics(Affine<kWide, W>& to, const W* mean, const W* rstd, int channel, int width) {
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int group = (channel + j) / width;
    to.mean[j] = mean[group];
    to.a[j] *= rstd[group];
  }
}

// act(z) or act'(z) of the activations that are called, not inlined: they would take most of the registers and of the
// time to compile.
template <bool kGrad, typename W>
__device__ FASTGEN_CALLED W called(int code, W z) {
  switch (code) {
    case kGelu: return kGrad ? act_grad<kGelu>(z) : act<kGelu>(z);
    case kGeluTanh: return kGrad ? act_grad<kGeluTanh>(z) : act<kGeluTanh>(z);
    case kTanh: return kGrad ? act_grad<kTanh>(z) : act<kTanh>(z);
    case kSilu: return kGrad ? act_grad<kSilu>(z) : act<kSilu>(z);
    default: return kGrad ? act_grad<kSigmoid>(z) : act<kSigmoid>(z);
  }
}

// z = act(z), or act'(z). One branch for all kCount. In half precision SiLU takes the short way.
template <bool kGrad, typename T, int kCount, typename W>
__device__ __forceinline__ void activate(int code, W (&z)[kCount]) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) z[j] = f(z[j]);
  };
  if (code == kNone || code == kRelu || code == kLeakyRelu) {
    const W slope = code == kNone ? W(1) : code == kRelu ? W(0) : W(kNegativeSlope);
    if constexpr (kGrad) {
      each([&](W x) { return x > W(0) ? W(1) : slope; });
    } else {
      each([&](W x) { return x < W(0) ? (slope == W(0) ? W(0) : x * slope) : x; });
    }
  } else if (sizeof(T) == 2 && code == kSilu) {
    each([](W x) {
      const W s = short_sigmoid(static_cast<float>(x));
      return kGrad ? s + x * s * (W(1) - s) : x * s;
    });
  } else if (sizeof(T) == 4 && code == kSilu) {
    each([](W x) { return kGrad ? act_grad<kSilu>(x) : act<kSilu>(x); });
  } else {
    each([&](W x) { return called<kGrad>(code, x); });
  }
}

// The pack y of act(z) for a pack of x.
template <int kWide, typename T, int kVec, typename W>
__device__ __forceinline__ Pack<T, kVec> normalised(const Pack<T, kVec>& x, const Affine<kWide, W>& f, int act) {
  W z[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const int k = kWide == 1 ? 0 : j;
    z[j] = (widen(x.v[j]) - f.mean[k]) * f.a[k] + f.d[k];
  }
  activate<false, T>(act, z);
  Pack<T, kVec> y;
#pragma unroll
  for (int j = 0; j < kVec; ++j) y.v[j] = narrow<T>(z[j]);
  return y;
}

// centred = x - mean and dz = dy act'(z) for packs of x and dy.
template <int kWide, typename T, int kVec, typename W>
__device__ __forceinline__ void gradient(const Pack<T, kVec>& x, const Pack<T, kVec>& dy, const Affine<kWide, W>& f,
                                         int act, W (&centred)[kVec], W (&dz)[kVec]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const int k = kWide == 1 ? 0 : j;
    centred[j] = widen(x.v[j]) - f.mean[k];
    dz[j] = centred[j] * f.a[k] + f.d[k];
  }
  activate<true, T>(act, dz);
#pragma unroll
  for (int j = 0; j < kVec; ++j) dz[j] *= widen(dy.v[j]);
}

// dx = a dz - k1 - (x - mean) k2
template <int kWide, typename T, int kVec, typename W>
__device__ __forceinline__ Pack<T, kVec> input_gradient(const W (&centred)[kVec], const W (&dz)[kVec],
                                                        const Affine<kWide, W>& f, const W (&k1)[kWide],
                                                        const W (&k2)[kWide]) {
  Pack<T, kVec> dx;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const int k = kWide == 1 ? 0 : j;
    dx.v[j] = narrow<T>(f.a[k] * dz[j] - k1[k] - centred[j] * k2[k]);
  }
  return dx;
}

// Copies a thread's items to its own slots in shared memory: [iterations, kThreads] packs, column threadIdx.x.
template <typename T, int kVec, int kWide>
__device__ void fetch(const Place<kVec, kWide>& at, const Line<const T>& from, Pack<T, kVec>* slots) {
  Pack<T, kVec>* slot = slots + threadIdx.x;
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) {
    if (kVec == 1 || from.vectors) {
      copy_async(slot, reinterpret_cast<const Pack<T, kVec>*>(from.at + i * from.step));
    } else {
      *slot = get<kVec>(from, i);
    }
  }
}

// Mean and centred sum of squares of each of the block's channels over the block's items: mean, m2 [count], shared.
template <typename T, int kVec, int kWide, typename W>
__device__ void channel_moments(const GroupPlan& p, const Place<kVec, kWide>& at, const Pack<T, kVec>* slots,
                                W* scratch, W* mean, W* m2) {
  const Pack<T, kVec>* own = slots + threadIdx.x;
  const int64_t count = at.positions(p, at.part);
  W sum[kWide] = {}, square[kWide] = {}, centre[kWide];
  const Pack<T, kVec>* slot = own;
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) {
    const Pack<T, kVec> x = *slot;
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[kWide == 1 ? 0 : j] += widen(x.v[j]);
  }
  fold_lanes(at, sum, scratch);
  if (at.lane == 0) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) mean[at.line * kWide + j] = count > 0 ? sum[j] / static_cast<W>(count) : W(0);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kWide; ++j) centre[j] = mean[at.line * kWide + j];
  slot = own;
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) {
    const Pack<T, kVec> x = *slot;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const W delta = widen(x.v[j]) - centre[kWide == 1 ? 0 : j];
      square[kWide == 1 ? 0 : j] += delta * delta;
    }
  }
  fold_lanes(at, square, scratch);
  if (at.lane == 0) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) m2[at.line * kWide + j] = square[j];
  }
  __syncthreads();
}

// The statistics of some of a channel's elements.
template <typename W>
struct Piece {
  W mean, m2, count;
};

// Mean and 1/sqrt(variance + eps) of a group of so many elements from its pieces, which the threads of a team take in
// turn, this one from first on. piece(i) -> Piece; total: the sum over the team.
template <typename W, typename F, typename G>
__device__ void pool(int pieces, int first, int team, W elements, W eps, const F& piece, const G& total,
                     W& mean, W& rstd) {
  W sum = 0, square = 0;
  for (int i = first; i < pieces; i += team) {
    const Piece<W> q = piece(i);
    sum += q.mean * (q.count / elements);
  }
  mean = total(sum);
  for (int i = first; i < pieces; i += team) {
    const Piece<W> q = piece(i);
    const W delta = q.mean - mean;
    square += (q.m2 + delta * delta * q.count) / elements;
  }
  rstd = W(1) / sqrt(total(square) + eps);
}

// Everything at once. Shared memory: slots, then of W: [kWide, kThreads] and four times [bundle].
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_act_fwd_kernel(const T* x,            // [N, C1, S]
                              const T* skip,         // [N, C2, S] or null
                              Parameters<W> given,   //
                              T* y,                  // [N, C, S]
                              W* mean,               // [N, G]
                              W* rstd,               // [N, G]
                              GroupPlan p, int64_t slots_bytes, W eps, int act) {
  auto* slots = dynamic_shared<Pack<T, kVec>>();
  W* scratch = reinterpret_cast<W*>(dynamic_shared<unsigned char>() + slots_bytes);
  W *channel_mean = scratch + kWide * kThreads, *channel_m2 = channel_mean + p.bundle;
  W *group_mean = channel_m2 + p.bundle, *group_rstd = group_mean + p.bundle;
  const Place<kVec, kWide> at(p);
  fetch(at, line_of<kVec>(p, at.image, at.channel, x, skip, p.early), slots);
  Affine<kWide, W> f = affine(p, at, given);
  copies_done();
  channel_moments(p, at, slots, scratch, channel_mean, channel_m2);
  if (p.parts > 1) {
    cluster_arrive();
    cluster_wait();
  }
  const int width = p.width, lane = static_cast<int>(threadIdx.x) % 32;
  for (int g = static_cast<int>(threadIdx.x) / 32; g < at.count / width; g += kWarps) {
    const auto piece = [&](int i) {
      const int rank = i / width, c = g * width + i % width;
      return Piece<W>{*of_rank(channel_mean + c, rank), *of_rank(channel_m2 + c, rank),
                      static_cast<W>(at.positions(p, rank))};
    };
    W m, r;
    pool(p.parts * width, lane, 32, static_cast<W>(p.width * p.positions), eps, piece,
         [](W v) { return warp_sum(v); }, m, r);
    if (lane == 0) {
      group_mean[g] = m;
      group_rstd[g] = r;
      if (at.part == 0) {
        const int64_t group = at.image * p.groups + at.first_channel / width + g;
        mean[group] = m;
        rstd[group] = r;
      }
    }
  }
  __syncthreads();
  if (p.parts > 1) cluster_arrive();  // this block reads the others' memory no more
  with_statistics(f, group_mean, group_rstd, at.channel - at.first_channel, p.width);
  const Line<T> to = line_of<kVec>(p, at.image, at.channel, y);
  const Pack<T, kVec>* slot = slots + threadIdx.x;
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) put(to, i, normalised(*slot, f, act));
  if (p.parts > 1) cluster_wait();  // and its own is read no more
}

// The statistics of every channel over one block's items. Shared memory: slots, of W [kWide, kThreads], 2 x [bundle].
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_act_fwd_partial_kernel(const T* x,        // [N, C1, S]
                                      const T* skip,     // [N, C2, S] or null
                                      W* partial_mean,   // [N, C, parts]
                                      W* partial_m2,     // [N, C, parts]
                                      GroupPlan p, int64_t slots_bytes) {
  auto* slots = dynamic_shared<Pack<T, kVec>>();
  W* scratch = reinterpret_cast<W*>(dynamic_shared<unsigned char>() + slots_bytes);
  W *channel_mean = scratch + kWide * kThreads, *channel_m2 = channel_mean + p.bundle;
  const Place<kVec, kWide> at(p);
  fetch(at, line_of<kVec>(p, at.image, at.channel, x, skip, p.early), slots);
  copies_done();
  channel_moments(p, at, slots, scratch, channel_mean, channel_m2);
  for (int c = static_cast<int>(threadIdx.x); c < at.count; c += kThreads) {
    const int64_t slot = (at.image * p.channels + at.first_channel + c) * p.parts + at.part;
    partial_mean[slot] = channel_mean[c];
    partial_m2[slot] = channel_m2[c];
  }
}

// mean and rstd of a group, one block each, whose pieces lie side by side.
template <int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_act_fwd_combine_kernel(const W* partial_mean,  // [N, C, parts]
                                      const W* partial_m2,    // [N, C, parts]
                                      W* mean,                // [N, G]
                                      W* rstd,                // [N, G]
                                      GroupPlan p, W eps) {
  const int pieces = p.width * p.parts;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * pieces;
  const auto piece = [&](int i) {
    return Piece<W>{partial_mean[base + i], partial_m2[base + i],
                    static_cast<W>(Place<kVec, kWide>::positions(p, i % p.parts))};
  };
  W m, r;
  pool(pieces, static_cast<int>(threadIdx.x), kThreads, static_cast<W>(p.width * p.positions), eps, piece,
       [](W v) { return block_sum(v); }, m, r);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = m;
    rstd[blockIdx.x] = r;
  }
}

// One block's items of y.
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    group_norm_act_fwd_apply_kernel(const T* x,           // [N, C1, S]
                                    const T* skip,        // [N, C2, S] or null
                                    Parameters<W> given,  //
                                    T* y,                 // [N, C, S]
                                    const W* mean,        // [N, G]
                                    const W* rstd,        // [N, G]
                                    GroupPlan p, int act) {
  const Place<kVec, kWide> at(p);
  Affine<kWide, W> f = affine(p, at, given);
  with_statistics(f, mean + at.image * p.groups, rstd + at.image * p.groups, at.channel, p.width);
  const Line<const T> from[1] = {line_of<kVec>(p, at.image, at.channel, x, skip, p.early)};
  const Line<T> to = line_of<kVec>(p, at.image, at.channel, y);
  stream<T>(at, from, [&](int64_t i, const Pack<T, kVec>(&packs)[1]) { put(to, i, normalised(packs[0], f, act)); });
}

// Adds a pack's dz and dz (x - mean) to sums [2, kWide].
template <int kWide, int kVec, typename W>
__device__ __forceinline__ void add_gradient(const W (&centred)[kVec], const W (&dz)[kVec], W (&sums)[2 * kWide]) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    sums[kWide == 1 ? 0 : j] += dz[j];
    sums[kWide + (kWide == 1 ? 0 : j)] += dz[j] * centred[j];
  }
}

// Everything at once. Shared memory: slots of x, slots of dy, then of W: [2 kWide, kThreads] and four times [bundle].
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_act_bwd_kernel(const T* dy,           // [N, C, S]
                              const T* x,            // [N, C1, S]
                              const T* skip,         // [N, C2, S] or null
                              Parameters<W> given,   //
                              const W* mean,         // [N, G]
                              const W* rstd,         // [N, G]
                              T* dx,                 // [N, C1, S]
                              T* dskip,              // [N, C2, S] or null
                              W* sum_dz,             // [N, C]
                              W* sum_dz_xhat,        // [N, C]
                              GroupPlan p, int64_t slots_bytes, int act) {
  auto* x_slots = dynamic_shared<Pack<T, kVec>>();
  auto* dy_slots = reinterpret_cast<Pack<T, kVec>*>(dynamic_shared<unsigned char>() + slots_bytes / 2);
  W* scratch = reinterpret_cast<W*>(dynamic_shared<unsigned char>() + slots_bytes);
  W *channel_1 = scratch + 2 * kWide * kThreads, *channel_2 = channel_1 + p.bundle;
  W *group_1 = channel_2 + p.bundle, *group_2 = group_1 + p.bundle;
  const Place<kVec, kWide> at(p);
  fetch(at, line_of<kVec>(p, at.image, at.channel, x, skip, p.early), x_slots);
  fetch(at, line_of<kVec>(p, at.image, at.channel, dy), dy_slots);
  Affine<kWide, W> f = affine(p, at, given);
  with_statistics(f, mean + at.image * p.groups, rstd + at.image * p.groups, at.channel, p.width);
  copies_done();
  W sums[2 * kWide] = {};
  int slot = static_cast<int>(threadIdx.x);
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) {
    W centred[kVec], dz[kVec];
    gradient(x_slots[slot], dy_slots[slot], f, act, centred, dz);
    add_gradient<kWide>(centred, dz, sums);
    if constexpr (std::is_same_v<T, W>) {  // loses nothing, and saves the activation
#pragma unroll
      for (int j = 0; j < kVec; ++j) dy_slots[slot].v[j] = dz[j];
    }
  }
  fold_lanes(at, sums, scratch);
  if (at.lane == 0) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      channel_1[at.line * kWide + j] = sums[j];
      channel_2[at.line * kWide + j] = sums[kWide + j];
    }
  }
  __syncthreads();
  if (p.parts > 1) {
    cluster_arrive();
    cluster_wait();
  }
  const int width = p.width, lane = static_cast<int>(threadIdx.x) % 32;
  const W elements = static_cast<W>(p.width * p.positions);
  for (int g = static_cast<int>(threadIdx.x) / 32; g < at.count / width; g += kWarps) {
    const W r = rstd[at.image * p.groups + at.first_channel / width + g];
    W k1 = 0, k2 = 0;
    for (int c = g * width + lane; c < (g + 1) * width; c += 32) {
      W s1 = 0, s2 = 0;
      for (int rank = 0; rank < p.parts; ++rank) {
        s1 += *of_rank(channel_1 + c, rank);
        s2 += *of_rank(channel_2 + c, rank);
      }
      const int channel = at.first_channel + c;
      if (at.part == 0) {
        sum_dz[at.image * p.channels + channel] = s1;
        sum_dz_xhat[at.image * p.channels + channel] = s2 * r;
      }
      const W a = gain(given, p.channels, at.image, channel);
      k1 += a * s1;
      k2 += a * s2;
    }
    k1 = warp_sum(k1);
    k2 = warp_sum(k2);
    if (lane == 0) {
      group_1[g] = r * k1 / elements;
      group_2[g] = r * r * r * k2 / elements;
    }
  }
  __syncthreads();
  if (p.parts > 1) cluster_arrive();  // this block reads the others' memory no more
  W k1[kWide], k2[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int group = (at.line * kWide + j) / width;
    k1[j] = group_1[group];
    k2[j] = group_2[group];
  }
  const Line<T> to = line_of<kVec>(p, at.image, at.channel, dx, dskip, p.early);
  slot = static_cast<int>(threadIdx.x);
  for (int64_t i = at.first; i < at.end; i += at.lanes, slot += kThreads) {
    W centred[kVec], dz[kVec];
    if constexpr (std::is_same_v<T, W>) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        centred[j] = x_slots[slot].v[j] - f.mean[kWide == 1 ? 0 : j];
        dz[j] = dy_slots[slot].v[j];
      }
    } else {
      gradient(x_slots[slot], dy_slots[slot], f, act, centred, dz);
    }
    put(to, i, input_gradient<kWide, T>(centred, dz, f, k1, k2));
  }
  if (p.parts > 1) cluster_wait();  // and its own is read no more
}

// S1 and S2 of every channel over one block's items. Shared memory: of W [2 kWide, kThreads].
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    group_norm_act_bwd_partial_kernel(const T* dy,           // [N, C, S]
                                      const T* x,            // [N, C1, S]
                                      const T* skip,         // [N, C2, S] or null
                                      Parameters<W> given,   //
                                      const W* mean,         // [N, G]
                                      const W* rstd,         // [N, G]
                                      W* partial_1,          // [N, C, parts]
                                      W* partial_2,          // [N, C, parts]
                                      GroupPlan p, int act) {
  const Place<kVec, kWide> at(p);
  Affine<kWide, W> f = affine(p, at, given);
  with_statistics(f, mean + at.image * p.groups, rstd + at.image * p.groups, at.channel, p.width);
  const Line<const T> from[2] = {line_of<kVec>(p, at.image, at.channel, x, skip, p.early),
                                 line_of<kVec>(p, at.image, at.channel, dy)};
  W sums[2 * kWide] = {};
  stream<T>(at, from, [&](int64_t, const Pack<T, kVec>(&packs)[2]) {
    W centred[kVec], dz[kVec];
    gradient(packs[0], packs[1], f, act, centred, dz);
    add_gradient<kWide>(centred, dz, sums);
  });
  fold_lanes(at, sums, dynamic_shared<W>());
  if (at.lane == 0) {
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const int64_t slot = (at.image * p.channels + at.channel + j) * p.parts + at.part;
      partial_1[slot] = sums[j];
      partial_2[slot] = sums[kWide + j];
    }
  }
}

// The sums of a group's channels, and its k1 and k2; one block a group, one warp a channel.
template <typename W>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_act_bwd_combine_kernel(const W* partial_1,   // [N, C, parts]
                                      const W* partial_2,   // [N, C, parts]
                                      Parameters<W> given,  //
                                      const W* rstd,        // [N, G]
                                      W* sum_dz,            // [N, C]
                                      W* sum_dz_xhat,       // [N, C]
                                      W* group_1,           // [N, G]
                                      W* group_2,           // [N, G]
                                      GroupPlan p) {
  const int group = static_cast<int>(blockIdx.x), first = group % p.groups * p.width;
  const int64_t image = group / p.groups;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const W r = rstd[blockIdx.x];
  W k1 = 0, k2 = 0;
  for (int c = first + static_cast<int>(threadIdx.x) / 32; c < first + p.width; c += kWarps) {
    const int64_t base = (image * p.channels + c) * p.parts;
    W s1 = 0, s2 = 0;
    for (int i = lane; i < p.parts; i += 32) {
      s1 += partial_1[base + i];
      s2 += partial_2[base + i];
    }
    s1 = warp_sum(s1);
    s2 = warp_sum(s2);
    if (lane == 0) {
      sum_dz[image * p.channels + c] = s1;
      sum_dz_xhat[image * p.channels + c] = s2 * r;
      const W a = gain(given, p.channels, image, c);
      k1 += a * s1;
      k2 += a * s2;
    }
  }
  k1 = block_sum(k1);
  k2 = block_sum(k2);
  if (threadIdx.x == 0) {
    const W elements = static_cast<W>(p.width * p.positions);
    group_1[blockIdx.x] = r * k1 / elements;
    group_2[blockIdx.x] = r * r * r * k2 / elements;
  }
}

// One block's items of dx and dskip.
template <typename T, int kVec, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    group_norm_act_bwd_apply_kernel(const T* dy,           // [N, C, S]
                                    const T* x,            // [N, C1, S]
                                    const T* skip,         // [N, C2, S] or null
                                    Parameters<W> given,   //
                                    const W* mean,         // [N, G]
                                    const W* rstd,         // [N, G]
                                    const W* group_1,      // [N, G]
                                    const W* group_2,      // [N, G]
                                    T* dx,                 // [N, C1, S]
                                    T* dskip,              // [N, C2, S] or null
                                    GroupPlan p, int act) {
  const Place<kVec, kWide> at(p);
  Affine<kWide, W> f = affine(p, at, given);
  with_statistics(f, mean + at.image * p.groups, rstd + at.image * p.groups, at.channel, p.width);
  W k1[kWide], k2[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const int64_t group = at.image * p.groups + (at.channel + j) / p.width;
    k1[j] = group_1[group];
    k2[j] = group_2[group];
  }
  const Line<const T> from[2] = {line_of<kVec>(p, at.image, at.channel, x, skip, p.early),
                                 line_of<kVec>(p, at.image, at.channel, dy)};
  const Line<T> to = line_of<kVec>(p, at.image, at.channel, dx, dskip, p.early);
  stream<T>(at, from, [&](int64_t i, const Pack<T, kVec>(&packs)[2]) {
    W centred[kVec], dz[kVec];
    gradient(packs[0], packs[1], f, act, centred, dz);
    put(to, i, input_gradient<kWide, T>(centred, dz, f, k1, k2));
  });
}

// The bytes of slots for a block's items.
int64_t slots(const Plan& p, int wide, int64_t pack, int sources) {
  return divide_up(p.share, kThreads / (p.bundle / wide)) * kThreads * pack * sources;
}

// A launch: the plan, and how much shared memory it takes. fused: one kernel does it all.
struct Launch {
  GroupPlan plan;
  int64_t slots_bytes, shared_bytes;
  bool fused;
};

// sources: how many tensors have to stay in shared memory. sums: values that a thread brings to a reduction.
Launch arrange(const Tensor& x, GroupPlan p, int vec, int wide, int64_t element, int64_t wide_element, int sources,
               int sums) {
  const int64_t scratch = sums * kThreads * wide_element, pack = vec * element;
  Launch to{};
  p.items = p.columns ? p.positions : p.positions / vec;
  if (cut(p, p.columns ? std::lcm(p.width, vec) : p.width, kThreads * wide, element, kPart, kRow)) {
    const int64_t bytes = p.bundle * p.positions * element;
    const int clusters = cluster_limit(x);
    for (p.parts = 1; p.parts < clusters && bytes > p.parts * kPart;) p.parts *= 2;
    p.share = divide_up(p.items, p.parts);
    to.slots_bytes = slots(p, wide, pack, sources);
    to.shared_bytes = to.slots_bytes + scratch + 4 * p.bundle * wide_element;
    to.fused = to.shared_bytes <= (p.parts > 1 ? std::min(kClusterPart, shared_limit(x)) : shared_limit(x));
    to.plan = p;
    if (to.fused) return to;
  }
  static_cast<Plan&>(p) = spread(p, vec, wide, element);
  to.slots_bytes = slots(p, wide, pack, sources);
  to.shared_bytes = scratch;
  to.plan = p;
  return to;
}

GroupPlan shape_of(const Tensor& x, const Tensor& y, int64_t num_groups) {
  GroupPlan p{};
  p.channels = static_cast<int>(y.size(1));
  p.early = static_cast<int>(x.size(1));
  p.common = std::gcd(p.early, p.channels);
  p.positions = y.numel() / (y.size(0) * p.channels);
  p.groups = static_cast<int>(num_groups);
  p.width = p.channels / p.groups;
  p.columns = p.positions == 1 || !y.is_contiguous();
  return p;
}

template <typename W>
Parameters<W> parameters(const OptTensor& weight, const OptTensor& bias, const OptTensor& scale,
                         const OptTensor& shift) {
  return {in<W>(weight), in<W>(bias), in<W>(scale), in<W>(shift)};
}

// x: [N, C1, *], skip: [N, C2, *], y: [N, C, *], all in one dense layout; weight, bias: [C]; scale, shift: [N, C];
// mean, rstd: [N, G]. The parameters and statistics are fp32 (fp64 for fp64).
void group_norm_act_fwd(const Tensor& x, const OptTensor& skip, const OptTensor& weight, const OptTensor& bias,
                        const OptTensor& scale, const OptTensor& shift, int64_t num_groups, double eps, int64_t act,
                        const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  if (y.numel() == 0) return;
  const Gpu gpu(x);
  GroupPlan shape = shape_of(x, y, num_groups);
  const int64_t n = y.size(0);
  const int code = static_cast<int>(act);
  shape.vectors = aligned(x.const_data_ptr()) && aligned(y.const_data_ptr()) &&
                  (!skip || aligned(skip->const_data_ptr()));
  for_accesses(x, "group_norm_act", shape, shape.common, [&](auto zero, auto vec, auto wide) {
    using T = decltype(zero);
    using W = Wide<T>;
    constexpr int kVec = vec, kWide = wide;
    const Launch to = arrange(x, shape, kVec, kWide, sizeof(T), sizeof(W), 1, kWide);
    const GroupPlan& p = to.plan;
    const auto given = parameters<W>(weight, bias, scale, shift);
    const W epsilon = static_cast<W>(eps);
    if (to.fused) {
      return launch_clusters(p.parts, group_norm_act_fwd_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads,
                             to.shared_bytes, gpu.stream, in<T>(x), in<T>(skip), given, out<T>(y), out<W>(mean),
                             out<W>(rstd), p, to.slots_bytes, epsilon, code);
    }
    const Tensor partial = torch::stable::new_empty(mean, {2, n, p.channels, p.parts});
    W *means = out<W>(partial), *m2s = means + n * p.channels * p.parts;
    launch(group_norm_act_fwd_partial_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads,
           to.slots_bytes + to.shared_bytes + 2 * p.bundle * sizeof(W), gpu.stream, in<T>(x), in<T>(skip), means, m2s,
           p, to.slots_bytes);
    launch(group_norm_act_fwd_combine_kernel<kVec, kWide, W>, dim3(static_cast<unsigned>(n * p.groups)), kThreads, 0,
           gpu.stream, means, m2s, out<W>(mean), out<W>(rstd), p, epsilon);
    launch(group_norm_act_fwd_apply_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads, 0, gpu.stream, in<T>(x),
           in<T>(skip), given, out<T>(y), out<W>(mean), out<W>(rstd), p, code);
  });
}

// dy: [N, C, *]; dx: [N, C1, *]; dskip: [N, C2, *]; sum_dz, sum_dz_xhat: [N, C]; the rest as in the forward
void group_norm_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& skip, const OptTensor& weight,
                        const OptTensor& bias, const OptTensor& scale, const OptTensor& shift, const Tensor& mean,
                        const Tensor& rstd, int64_t num_groups, int64_t act, const Tensor& dx, const OptTensor& dskip,
                        const Tensor& sum_dz, const Tensor& sum_dz_xhat) {
  if (dy.numel() == 0) return;
  const Gpu gpu(x);
  GroupPlan shape = shape_of(x, dy, num_groups);
  const int64_t n = dy.size(0);
  const int code = static_cast<int>(act);
  shape.vectors = aligned(x.const_data_ptr()) && aligned(dy.const_data_ptr()) && aligned(dx.const_data_ptr()) &&
                  (!skip || (aligned(skip->const_data_ptr()) && aligned(dskip->const_data_ptr())));
  for_accesses(x, "group_norm_act", shape, shape.common, [&](auto zero, auto vec, auto wide) {
    using T = decltype(zero);
    using W = Wide<T>;
    constexpr int kVec = vec, kWide = wide;
    const Launch to = arrange(x, shape, kVec, kWide, sizeof(T), sizeof(W), 2, 2 * kWide);
    const GroupPlan& p = to.plan;
    const auto given = parameters<W>(weight, bias, scale, shift);
    const W *means = in<W>(mean), *rstds = in<W>(rstd);
    W *s1 = out<W>(sum_dz), *s2 = out<W>(sum_dz_xhat);
    if (to.fused) {
      return launch_clusters(p.parts, group_norm_act_bwd_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads,
                             to.shared_bytes, gpu.stream, in<T>(dy), in<T>(x), in<T>(skip), given, means, rstds,
                             out<T>(dx), out<T>(dskip), s1, s2, p, to.slots_bytes, code);
    }
    const Tensor partial = torch::stable::new_empty(mean, {2, n, p.channels, p.parts});
    const Tensor pooled = torch::stable::new_empty(mean, {2, n, p.groups});
    W *part_1 = out<W>(partial), *part_2 = part_1 + n * p.channels * p.parts;
    W *group_1 = out<W>(pooled), *group_2 = group_1 + n * p.groups;
    launch(group_norm_act_bwd_partial_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads, to.shared_bytes, gpu.stream,
           in<T>(dy), in<T>(x), in<T>(skip), given, means, rstds, part_1, part_2, p, code);
    launch(group_norm_act_bwd_combine_kernel<W>, dim3(static_cast<unsigned>(n * p.groups)), kThreads, 0, gpu.stream,
           part_1, part_2, given, rstds, s1, s2, group_1, group_2, p);
    launch(group_norm_act_bwd_apply_kernel<T, kVec, kWide, W>, blocks(n, p), kThreads, 0, gpu.stream, in<T>(dy),
           in<T>(x), in<T>(skip), given, means, rstds, group_1, group_2, out<T>(dx), out<T>(dskip), p, code);
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "group_norm_act_fwd(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "int num_groups, float eps, int act, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_act_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, Tensor mean, Tensor rstd, int num_groups, int act, Tensor(a!) dx, Tensor(b!)? dskip, "
      "Tensor(c!) sum_dz, Tensor(d!) sum_dz_xhat) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) {
  m.impl("group_norm_act_fwd", TORCH_BOX(&fastgen::group_norm_act_fwd));
  m.impl("group_norm_act_bwd", TORCH_BOX(&fastgen::group_norm_act_bwd));
}
