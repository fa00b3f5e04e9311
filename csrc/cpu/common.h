// What the CPU kernels share: the tensor type, checks, dtypes, layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../common/tensors.h"
#include "isa.h"

namespace fastgen {

// p + offset, and null for null
template <typename T>
T* at(T* p, int64_t offset) {
  return p == nullptr ? nullptr : p + offset;
}

// An image in memory, element i (row-major over C, H, W) at (i / inner) * row_stride + (i % inner) * inner_stride.
// Contiguous: one row. Channels last: a row per channel.
struct Rows {
  int64_t images, size, inner, row_stride, inner_stride;
};

// A piece of one row of one image: count elements, the first at memory offset, with logical index first.
struct Span {
  int64_t image, first, count, offset, stride;
};

// The sum of n lanes, a power of two, in a fixed order; the lanes are used up.
template <typename W>
FASTGEN_BODY W fold_lanes(W* lanes, int64_t n) {
  for (int64_t half = n / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Calls f(i) for i < count, in parallel: whichever thread is free takes the next. On a busy machine cores are not
// equally fast, and one that falls behind must not keep the others waiting.
template <typename F>
void take_turns(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

constexpr int64_t kSpan = 512;

// Calls body(Span) for pieces of at most kSpan elements that together cover every image, in parallel.
template <typename F>
void for_spans(const Rows& r, const F& body) {
  if (r.images * r.size == 0) return;
  const int64_t pieces = (r.inner + kSpan - 1) / kSpan, lines = r.size / r.inner;
  torch::stable::parallel_for(0, r.images * lines * pieces, 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / (lines * pieces), line = i / pieces % lines, start = i % pieces * kSpan;
      body(Span{image, line * r.inner + start, std::min(kSpan, r.inner - start),
                image * r.size + line * r.row_stride + start * r.inner_stride, r.inner_stride});
    }
  });
}

// A span's elements, count of them stride apart, without gaps and widened: where they lie if that is what they are,
// else in the buffer. So a body's arithmetic vectorises whatever the layout; its loop says `omp simd`, since the
// compiler cannot know that none of the pointers overlap.
template <typename T, typename W>
FASTGEN_BODY const W* gather(const T* __restrict p, int64_t count, int64_t stride, W* __restrict buffer) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, W>) return p;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<W>(p[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<W>(p[i * stride]);
  }
  return buffer;
}
// Where to put results for `scatter`, which takes them to their place if they are not there yet.
template <typename T, typename W>
FASTGEN_BODY W* target(T* p, int64_t stride, W* buffer) {
  if constexpr (std::is_same_v<T, W>)
    if (stride == 1) return p;
  return buffer;
}
template <typename T, typename W>
FASTGEN_BODY void scatter(const W* values, int64_t count, int64_t stride, T* p) {
  if (static_cast<const void*>(values) == p) return;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i * stride] = static_cast<T>(values[i]);
  }
}

inline Rows flat(const Tensor& x) {
  const int64_t n = x.size(0), size = n == 0 ? 0 : x.numel() / n;
  return {n, size, size, 0, 1};
}

// Rows in memory order where only position by position matters; in logical order where noise is drawn.
inline Rows rows_of(const Tensor& x) {
  if (x.is_contiguous()) return flat(x);
  const int64_t n = x.size(0), c = x.size(1), size = x.numel() / n;
  return {n, size, size / c, 1, c};
}

// Calls f(T{}) with T the tensor's dtype: fp32, fp64, fp16 or bf16. f: [&](auto zero) { using T = decltype(zero); … }
template <typename F>
void for_dtype(const Tensor& t, const char* op, const F& f) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default: STD_TORCH_CHECK(false, op, ": tensors must be fp32, fp64, fp16 or bf16");
  }
}

}  // namespace fastgen
