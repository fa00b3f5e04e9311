// What the CUDA kernels share: dtypes, vectors of 16 bytes, sums in a fixed order. Launches: launch.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "common/philox.h"  // FASTGEN_HD
#include "cuda/launch.cuh"  // by its place under csrc, so that a folder earlier on the include path can replace it

namespace fastgen {

// Of a block. Kernels say __launch_bounds__(kThreads, 1): without the 1, ptxas may spill to fit in one more block.
constexpr int kThreads = 256;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// A number in its storage type, rounded to nearest even: narrow<T>(w)
template <typename T, typename W>
__device__ __forceinline__ T narrow(W x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return static_cast<T>(x);
  }
}

// A few consecutive elements, at most 16 bytes, read or written at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

// How many elements of T one access takes, where kCount are wanted.
template <typename T, int kCount>
constexpr int kPack = kCount * sizeof(T) <= 16 ? kCount : 16 / sizeof(T);

// kCount elements from p, widened; p is aligned to min(kCount, 16 / sizeof(T)) elements.
template <int kCount, typename T, typename W>
__device__ __forceinline__ void load_wide(const T* p, W (&to)[kCount]) {
  constexpr int kEach = kPack<T, kCount & -kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kEach) {
    const auto pack = *reinterpret_cast<const Pack<T, kEach>*>(p + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = widen(pack.v[j]);
  }
}

// kCount elements to p, narrowed; p is aligned as for load_wide.
template <int kCount, typename T, typename W>
__device__ __forceinline__ void store_narrow(T* p, const W (&from)[kCount]) {
  constexpr int kEach = kPack<T, kCount & -kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kEach) {
    Pack<T, kEach> pack;
#pragma unroll
    for (int j = 0; j < kEach; ++j) pack.v[j] = narrow<T>(from[i + j]);
    *reinterpret_cast<Pack<T, kEach>*>(p + i) = pack;
  }
}

// Whether p, which may be null, is a multiple of so many bytes.
inline bool aligned(const void* p, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The grid for a loop in strides of the grid over so many items, one for a thread. The cap keeps it within 2^31 - 1.
inline unsigned blocks_for(int64_t items, int threads = kThreads) {
  return static_cast<unsigned>(std::min<int64_t>((items + threads - 1) / threads, 1 << 24));
}

// First item of this thread, and the stride, of such a loop.
__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// a / b for 0 <= a and 0 < b. CUDA's own 64-bit division is a call, around which registers are spilled.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  int64_t result = 0, rest = 0;
#pragma unroll 1
  for (int bit = 62; bit >= 0; --bit) {  // long division; more than 2^32 items are rare
    rest = rest << 1 | (a >> bit & 1);
    if (rest >= b) rest -= b, result |= int64_t{1} << bit;
  }
  return result;
}

// The sum over a warp, in every lane, in a fixed order. All 32 lanes call it.
template <typename W>
__device__ __forceinline__ W warp_sum(W x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kFullWarp, x, apart);
  return x;
}

// The sum over a block of whole warps, in every thread, in a fixed order. All threads call it.
template <typename W>
__device__ __forceinline__ W block_sum(W x) {
  __shared__ W sums[32];
  x = warp_sum(x);
  if (blockDim.x == 32) return x;
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : W(0);
  x = warp_sum(x);
  __syncthreads();  // before the next call writes
  return x;
}

// Calls f(T{}) with T the tensor's dtype: fp32, fp64, fp16 or bf16. f: [&](auto zero) { using T = decltype(zero); … }
template <typename F>
void for_dtype(const Tensor& t, const char* op, const F& f) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, ": tensors must be fp32, fp64, fp16 or bf16");
  }
}

}  // namespace fastgen
