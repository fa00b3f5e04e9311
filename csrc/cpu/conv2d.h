// What the convolution kernels share: a call's description, its buffers, its rows of normalised input.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../common/activations.h"
#include "activations.h"
#include "gemm.h"
#include "winograd.h"

namespace fastgen {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// One call. Images are NHWC: x [N, H, W, C1], skip [N, H, W, C2], read as one input of C = C1 + C2 channels that is
// normalised and activated on the way where `mean` is given. The output has `phases` (1, or the 4 sub-pixels of a
// map that grows twice) of K channels on a grid [gh, gw]; y and residual: [N, yh, yw, K].
// Images are of one dtype, `dtype`; the arithmetic is in W.
template <typename W>
struct Conv {
  const void *x, *skip, *residual;
  void* y;
  const W *mean, *a, *b;  // input: (x - mean) a + b, [N, C] each
  const W *gain, *bias;   // output: sum * gain + bias, [K]; bias [N, K] where bias_stride is K
  const W* packed;
  int64_t n, h, w, c1, c2, k, kh, kw, sh, sw, pt, pl, dh, dw, phases, gh, gw, yh, yw, bias_stride;
  int in_act, act;
  ScalarType dtype;

  int64_t c() const { return c1 + c2; }
  int64_t taps() const { return kh * kw; }
};

template <typename W>
constexpr ScalarType dtype_of = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;

template <typename W>
int64_t lanes() {
  return vector_bytes(isa()) / static_cast<int64_t>(sizeof(W));
}

constexpr int64_t kHugePage = 2 << 20;

// Asks for huge pages in [p, p + bytes), not touched yet: F streams at once are more pages than a TLB holds.
inline void huge_pages(void* p, int64_t bytes) {
#ifdef __linux__
  const auto begin = round_up(reinterpret_cast<int64_t>(p), kHugePage);
  const auto end = (reinterpret_cast<int64_t>(p) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure is no error
#endif
}

// Memory that a thread keeps from call to call: pages that are fresh each time cost more than what is done in them.
template <int kSlot>
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    const int64_t align = bytes < kHugePage ? 64 : kHugePage;
    memory.reset(std::aligned_alloc(align, round_up(bytes, align)));
    if (!memory) throw std::bad_alloc();
    huge_pages(memory.get(), round_up(bytes, align));
    size = bytes;
  }
  return memory.get();
}

// A block of channels of one of the sources: `count` channels from `local` on, which are channels `first` of all.
struct Block {
  const void* source;
  int64_t channels, local, first, count;
};

// Calls f(T{}) for the images' dtype; for fp64 arithmetic that is fp64.
template <typename W, typename F>
FASTGEN_BODY void for_images(ScalarType dtype, const F& f) {
  if constexpr (std::is_same_v<W, double>) {
    f(double{});
  } else {
    if (dtype == ScalarType::Float) return f(float{});
    if (dtype == ScalarType::BFloat16) return f(BFloat16{});
    f(Half{});
  }
}

constexpr int64_t kColumnsAhead = 6;

// Channels that the input transform works on at once: those of a cache line, so that all that it touches stays in L1.
template <typename W>
constexpr int64_t kWide = 64 / static_cast<int64_t>(sizeof(W));

// Calls f(n), with n known to the compiler where it is kWide.
template <typename W, typename F>
FASTGEN_BODY void for_width(int64_t n, const F& f) {
  if (n == kWide<W>) return f(std::integral_constant<int64_t, kWide<W>>{});
  f(n);
}

// Columns [lo, hi) of a row of kWide channels. from: [., block.channels]; z: [., stride]
template <Isa kIsa, typename W>
FASTGEN_BODY void normalise(const Conv<W>& p, const W* from, const Block& block, int64_t at, int64_t lo, int64_t hi,
                            W* z, int64_t stride) {
  using S = Simd<kIsa, W>;
  constexpr int kVectors = kWide<W> / S::kLanes;
  typename S::Vec m[kVectors], a[kVectors], b[kVectors];
  for (int v = 0; v < kVectors && p.mean != nullptr; ++v) {
    m[v] = S::load(p.mean + at + v * S::kLanes);
    a[v] = S::load(p.a + at + v * S::kLanes);
    b[v] = S::load(p.b + at + v * S::kLanes);
  }
  const int64_t ahead = p.w * block.channels;  // a row
  for (int64_t col = lo; col < hi; ++col) {
    const W* x = from + col * block.channels;
    W* to = z + col * stride;
    __builtin_prefetch(x + ahead);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const typename S::Vec given = S::load(x + v * S::kLanes);
      S::store(to + v * S::kLanes, p.mean == nullptr ? given : (given - m[v]) * a[v] + b[v]);
    }
  }
}

// Columns 0 ... cols of row y of an image's normalised input, zero outside the image. z: [cols, stride], of which
// the first round_up(count) of each column are written.
template <Isa kIsa, typename W>
FASTGEN_BODY void load_row(const Conv<W>& p, const Block& block, int64_t image, int64_t y, int64_t cols,
                           W* __restrict z, int64_t stride) {
  const int64_t width = round_up(block.count, Simd<kIsa, W>::kLanes);
  const bool inside = y >= 0 && y < p.h;
  const int64_t lo = inside ? std::min(p.pl, cols) : cols, hi = inside ? std::min(cols, p.w + p.pl) : cols;
  for (int64_t col = 0; col < cols; ++col) {
    if (col == lo) col = hi;
    if (col >= cols) break;
    for (int64_t c = 0; c < width; ++c) z[col * stride + c] = W(0);
  }
  if (lo >= hi) return;
  const int64_t at = image * p.c() + block.first;
  const W *m = p.mean + at, *a = p.a + at, *b = p.b + at;
  for_images<W>(p.dtype, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const T* line = static_cast<const T*>(block.source) + (image * p.h + y) * p.w * block.channels + block.local;
    if constexpr (std::is_same_v<T, W>)
      if (block.count == kWide<W>) return normalise<kIsa>(p, line - p.pl * block.channels, block, at, lo, hi, z, stride);
    for (int64_t col = lo; col < hi; ++col) {
      const T* __restrict from = line + (col - p.pl) * block.channels;
      for (int64_t c = 0; c < block.count; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(from + kColumnsAhead * block.channels + c);
      W* __restrict to = z + col * stride;
      if (p.mean == nullptr)
        for (int64_t c = 0; c < block.count; ++c) to[c] = static_cast<W>(from[c]);
      else
        for (int64_t c = 0; c < block.count; ++c) to[c] = (static_cast<W>(from[c]) - m[c]) * a[c] + b[c];
      for (int64_t c = block.count; c < width; ++c) to[c] = W(0);
    }
  });
  if (stride == width) return activate(p.in_act, z + lo * stride, (hi - lo) * stride);
  for (int64_t col = lo; col < hi; ++col) activate(p.in_act, z + col * stride, width);
}

constexpr int64_t kSkew = 16;              // keeps F equal strides from falling into one set of the cache

enum Algorithm : int64_t { kDirect, kF23, kF43, kF32 };

constexpr int64_t kGroup = 64;             // output channels that one task computes together

template <typename Body>
auto for_algorithm(int64_t algorithm, const Body& body) {
  switch (algorithm) {
    case kF23: return body(F23{});
    case kF43: return body(F43{});
    case kF32: return body(F32{});
    default: return body(Direct{});
  }
}

template <typename F>
constexpr int64_t kNumbers = F::kIn * F::kIn;

// How the output grid is cut: `rows` rows of `cols` tiles in each image.
template <typename F>
struct Grid {
  int64_t rows, cols;
  template <typename W>
  explicit Grid(const Conv<W>& p) : rows((p.gh + F::kOut - 1) / F::kOut), cols((p.gw + F::kOut - 1) / F::kOut) {}
};

// The channel blocks of both sources, in turn: f(block, where it begins in a row of v).
template <typename W, typename F>
FASTGEN_BODY void for_blocks(const Conv<W>& p, int64_t width, int64_t lanes, const F& f) {
  for (int64_t c = 0; c < p.c1; c += width) f(Block{p.x, p.c1, c, c, std::min(width, p.c1 - c)}, c);
  const int64_t begin = round_up(p.c1, lanes);
  for (int64_t c = 0; c < p.c2; c += width)
    f(Block{p.skip, p.c2, c, p.c1 + c, std::min(width, p.c2 - c)}, begin + c);
}

// v of tile rows [begin, end), counted over all images; the stretch begins with tile row `first`.
// strip: transform_bytes, the kIn rows of input that a row of tiles reads.
struct Transform {
  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY void run(F, const Conv<W>* call, W* v, int64_t stride, int64_t ld, int64_t first, int64_t begin,
                        int64_t end, W* strip) {
    using S = Simd<kIsa, W>;
    using Vec = typename S::Vec;
    constexpr int kIn = F::kIn, kOut = F::kOut;
    const Conv<W>& p = *call;
    const Grid<F> grid(p);
    const int64_t cols = grid.cols * kOut + kIn - kOut;
    alignas(64) W ring[kIn][kIn][kWide<W>];  // the transform of column x in ring[x % kIn]
    for_blocks(p, kWide<W>, S::kLanes, [&](const Block& block, int64_t at) __attribute__((always_inline)) {
      const int64_t line = cols * round_up(block.count, S::kLanes);
      int64_t next = -1;  // the tile row whose upper lines are still in the strip
      for (int64_t u = begin; u < end; ++u) {
        const int64_t image = u / grid.rows, top = u % grid.rows * kOut;
        for (int64_t i = u == next && top > 0 ? kIn - kOut : 0; i < kIn; ++i)
          load_row<kIsa>(p, block, image, top + i - p.pt, cols, strip + (top + i) % kIn * line, line / cols);
        next = u + 1;
        const W* lines[kIn];
        for (int i = 0; i < kIn; ++i) lines[i] = strip + (top + i) % kIn * line;
        W* row = v + (u - first) * grid.cols * ld + at;
        for_width<W>(line / cols, [&](auto cb) __attribute__((always_inline)) {
          for (int64_t tile = 0; tile < grid.cols; ++tile) {
            W(*columns[kIn])[kWide<W>];
            for (int64_t j = 0, x = tile * kOut; j < kIn; ++j, ++x) {
              columns[j] = ring[x % kIn];
              if (tile == 0 || j >= kIn - kOut)
                for (int64_t e = 0; e < cb; e += S::kLanes) {
                  Vec d[kIn], t[kIn];
                  for (int i = 0; i < kIn; ++i) d[i] = S::load(lines[i] + x * cb + e);
                  F::data(d, t);
                  for (int i = 0; i < kIn; ++i) S::store(columns[j][i] + e, t[i]);
                }
            }
            for (int i = 0; i < kIn; ++i)
              for (int64_t e = 0; e < cb; e += S::kLanes) {
                Vec d[kIn], t[kIn];
                for (int j = 0; j < kIn; ++j) d[j] = S::load(columns[j][i] + e);
                F::data(d, t);
                for (int j = 0; j < kIn; ++j) S::store(row + (i * kIn + j) * stride + tile * ld + e, t[j]);
              }
          }
        });
      }
    });
  }
};

template <typename F, typename W>
int64_t transform_bytes(const Conv<W>& p) {
  return F::kIn * (Grid<F>(p).cols * F::kOut + F::kIn - F::kOut) * kWide<W> * sizeof(W);
}

// v of `count` tile rows, in parallel.
template <typename F, typename W>
void transform(const Conv<W>& p, W* v, int64_t stride, int64_t ld, int64_t first, int64_t count) {
  const int64_t bytes = transform_bytes<F>(p);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    W* strip = static_cast<W*>(scratch<2>(bytes));
    multiversion<Transform>(F{}, &p, v, stride, ld, first, first + begin, first + end, strip);
  });
}

// a, b of z = (x - mean) a + b and the mean itself, for every image and channel, from the groups' statistics.
template <typename W>
struct Prologue {
  std::vector<W> mean, a, b;

  Prologue(int64_t n, int64_t c, const OptTensor& group_mean, const OptTensor& group_rstd, const OptTensor& weight,
           const OptTensor& bias, const OptTensor& scale, const OptTensor& shift) {
    if (!group_mean) return;
    const int64_t width = c / group_mean->size(1);
    const W *mu = in<W>(*group_mean), *r = in<W>(*group_rstd), *w = in<W>(weight), *beta = in<W>(bias);
    const W *gamma = in<W>(scale), *delta = in<W>(shift);
    mean.resize(n * c), a.resize(n * c), b.resize(n * c);
    for (int64_t i = 0; i < n * c; ++i) {
      const W one = gamma != nullptr ? W(1) + gamma[i] : W(1);
      mean[i] = mu[i / width];
      a[i] = (w != nullptr ? w[i % c] * one : one) * r[i / width];
      b[i] = (beta != nullptr ? beta[i % c] * one : W(0)) + (delta != nullptr ? delta[i] : W(0));
    }
  }
};

}  // namespace fastgen
