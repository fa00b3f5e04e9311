// What the CPU kernels share: the tensor type, checks, dtypes, layouts.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "isa.h"

namespace fastgen {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// Arithmetic happens in fp32, for fp64 tensors in fp64.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* in(const OptTensor& t) {
  return t ? in<T>(*t) : nullptr;
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
T* out(const OptTensor& t) {
  return t ? out<T>(*t) : nullptr;
}

// An image in memory, element i (row-major over C, H, W) at (i / inner) * row_stride + (i % inner) * inner_stride.
// Contiguous: one row. Channels last: a row per channel.
struct Rows {
  int64_t images, size, inner, row_stride, inner_stride;
};

inline Rows rows_of(const Tensor& x) {
  const int64_t n = x.size(0), size = n == 0 ? 0 : x.numel() / n;
  if (x.is_contiguous()) return {n, size, size, 0, 1};
  const int64_t c = x.size(1);
  return {n, size, size / c, 1, c};
}

template <typename F>
void parallel(int64_t n, int64_t grain, const F& f) {
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace fastgen

// Runs the body with scalar_t bound to the tensor's dtype: fp32, fp64, fp16, bf16.
#define FASTGEN_FLOATING(dtype, name, ...)                                                     \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), torch::headeronly::ScalarType::Float,     \
                  torch::headeronly::ScalarType::Double, torch::headeronly::ScalarType::Half,  \
                  torch::headeronly::ScalarType::BFloat16)
