// What csrc/cuda/launch.cuh has, for kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

#include "common/tensors.h"

// The kernels take CPU tensors here, in a namespace of their own: a GPU's may be loaded too.
#define fastgen_cuda fastgen_cuda_on_cpu
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

namespace fastgen {

inline bool on_gpu(const Tensor& x) { return x.is_cpu(); }

struct Gpu {
  explicit Gpu(const Tensor&) {}
  cudaStream_t stream = nullptr;
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Args&... args) {
  cuda_on_cpu::run(grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_on_cpu::shared_memory());
}

}  // namespace fastgen
