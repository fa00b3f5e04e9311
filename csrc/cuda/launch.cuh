// How a launcher meets the GPU: the tensor's device, the current stream, the launch and its check. Nothing else in
// csrc/cuda calls the CUDA runtime or writes <<<>>>: tests/cuda_on_cpu has a file of this name, with the same
// functions, that runs kernels on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensors.h"

namespace fastgen {

inline bool on_gpu(const Tensor& x) { return x.is_cuda(); }

// Makes x's GPU the current one as long as it lives; stream is PyTorch's current stream there.
struct Gpu {
  explicit Gpu(const Tensor& x) : guard(x.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  const torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

// Runs kernel(args…); an error of the launch, or one that an earlier kernel left, is thrown here.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Args&... args) {
  if (shared_bytes > 48 * 1024) {  // more than every GPU gives unasked
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The shared_bytes of the launch.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

}  // namespace fastgen
