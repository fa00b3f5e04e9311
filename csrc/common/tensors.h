// What launchers on the CPU and on GPUs do with tensors: their pointers, and the type to compute in.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

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

}  // namespace fastgen
