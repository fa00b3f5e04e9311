// What the convolution kernels share: a call's description, its buffers, its rows of normalised input.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>

#include "../common/activations.h"
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

template <int kAct, typename W>
FASTGEN_BODY void activate_loop(W* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = act<kAct>(z[i]);
}
// z = act(z). z: [n]
template <typename W>
FASTGEN_BODY void activate(int code, W* z, int64_t n) {
  switch (code) {
    case kRelu: return activate_loop<kRelu>(z, n);
    case kLeakyRelu: return activate_loop<kLeakyRelu>(z, n);
    case kSilu: return activate_loop<kSilu>(z, n);
    case kGelu: return activate_loop<kGelu>(z, n);
    case kGeluTanh: return activate_loop<kGeluTanh>(z, n);
    case kTanh: return activate_loop<kTanh>(z, n);
    case kSigmoid: return activate_loop<kSigmoid>(z, n);
    default: return;
  }
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

}  // namespace fastgen
