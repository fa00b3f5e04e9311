// Blocks that reach into one another's shared memory (thread block clusters, compute capability 9.0 on), and copies
// into shared memory that no register waits for (8.0 on). Like launch.cuh this file has its double in tests/cuda_on_cpu.
#pragma once

#include "cuda/launch.cuh"

#define FASTGEN_CALLED __noinline__  // a function that is not inlined

namespace fastgen {

// The shared memory that a block may ask for on x's GPU, in bytes.
inline int64_t shared_limit(const Tensor& x) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  return bytes;
}

// How many blocks a cluster may have on x's GPU: 1 where there are none, or where none of the architectures that this
// file was compiled for knows them (its PTX may be older than the GPU).
inline int cluster_limit(const Tensor& x) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index()));
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch >= 900 && arch <= major * 100 + minor * 10) return 8;  // what every such GPU takes
  return 1;
}

// launch() in clusters of so many blocks, which follow each other in grid.x.
template <typename... Params, typename... Args>
void launch_clusters(int size, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, const Args&... args) {
  if (size == 1) return launch(kernel, grid, block, shared_bytes, stream, args...);
  if (shared_bytes > 48 * 1024) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A barrier of all threads of a cluster in two halves: what was written before the one is seen after the other.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Where p, an address in this block's shared memory, is in that of the cluster's block of this rank.
template <typename T>
__device__ __forceinline__ const T* of_rank(const T* p, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
#else
  return p;
#endif
}

// *to = *from, in the background until copies_done(); only the thread that copied may read it then. to: shared.
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
    return;
  }
#endif
  *to = *from;
}
__device__ __forceinline__ void copies_done() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fastgen
