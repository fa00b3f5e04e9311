// What csrc/cuda/cluster.cuh has, for kernels on a CPU. The environment can make the GPU's shared memory small and its
// clusters too, so that small tensors take the ways of large ones.
#pragma once

#include <cstdlib>

#include "cuda/launch.cuh"

#define FASTGEN_CALLED __attribute__((noinline))

namespace fastgen {

inline int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}
inline int64_t shared_limit(const Tensor&) { return setting("CUDA_ON_CPU_SHARED", 227 * 1024); }
inline int cluster_limit(const Tensor&) { return static_cast<int>(setting("CUDA_ON_CPU_CLUSTER", 8)); }

template <typename... Params, typename... Args>
void launch_clusters(int size, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                     const Args&... args) {
  cuda_on_cpu::run(grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); },
                   static_cast<unsigned>(size));
}

inline void cluster_arrive() { cuda_on_cpu::arrive_at_cluster(); }
inline void cluster_wait() { cuda_on_cpu::wait_for_cluster(); }
template <typename T>
const T* of_rank(const T* p, int rank) {
  return static_cast<const T*>(cuda_on_cpu::shared_of_rank(p, rank));
}

template <typename T>
void copy_async(T* to, const T* from) {
  *to = *from;
}
inline void copies_done() {}

}  // namespace fastgen
