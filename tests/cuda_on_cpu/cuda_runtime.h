// The part of CUDA C++ that csrc/cuda uses, in plain C++, so that g++ compiles the very same .cu files and a CPU runs
// them: see runtime.cpp and cuda/launch.cuh. Found by `#include <cuda_runtime.h>`, since this folder comes first on
// the include path.
#pragma once

// Before __CUDA_ARCH__ is defined: PyTorch's own headers shall see a host compiler, the kernels a device's.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after the other
#define __CUDACC__ 1
#define __CUDA_ARCH__ 900

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the thread that runs

namespace cuda_on_cpu {

// Runs every thread of every block; throws where threads wait for one another in vain or a pointer was misaligned.
// Blocks run one after the other, those of a cluster together; then they must do without static __shared__ arrays.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread, unsigned cluster = 1);
void* shared_memory();
const void* shared_of_rank(const void* p, int rank);

void wait_for_block();
void arrive_at_cluster();
void wait_for_cluster();
// The bits that lane `from` gave; every lane of the mask must come.
uint64_t exchange(unsigned mask, uint64_t bits, int from);
int lane();

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::lane()); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_on_cpu::shuffle(mask, value, from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int from = cuda_on_cpu::lane() + static_cast<int>(by);
  return cuda_on_cpu::shuffle(mask, value, from < 32 ? from : cuda_on_cpu::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int from = cuda_on_cpu::lane() - static_cast<int>(by);
  return cuda_on_cpu::shuffle(mask, value, from >= 0 ? from : cuda_on_cpu::lane());
}

// One rounding each: compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, 4);
  return a;
}
inline uint32_t __float2uint_rn(float a) { return static_cast<uint32_t>(std::nearbyint(a)); }
inline uint32_t __double2uint_rn(double a) { return static_cast<uint32_t>(std::nearbyint(a)); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
