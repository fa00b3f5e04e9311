// reparameterize: z = mu + exp(logvar/2) noise and KL(N(mu, sigma²) || N(0, I)); see fastgen/ops/reparameterize.py.
//
// Limit: memory. Forward: mu and logvar are read and z is written (noise is read, where it is given); 64 MB of mu:
// 192 MB, 40 us on an H200 (4.8 TB/s). Backward: mu, logvar and dz are read, dmu and dlogvar written: 320 MB, 67 us.
// Noise and the exponential take some 55 instructions an element: 84 us for the 32 M elements of 64 MB of bf16, where
// they are the limit, 42 us for the 16 M of fp32.
//
// The KL has one order, whatever the batch, the alignment and the source of the noise: items of a thread, threads of a
// block, blocks of an image, each sum in a slot of its own.
#include <torch/csrc/stable/ops.h>

#include "common/activations.h"
#include "images.cuh"

namespace fastgen {
namespace {

constexpr int kItems = 4;  // of a thread: a block has up to 4 kThreads items of one image

template <typename T>
struct Args {
  Images images;
  const T *mu, *logvar, *noise;  // [N, *], noise may be null
  const int64_t* seeds;          // [N], may be null
};

template <typename T, typename I>
__device__ __forceinline__ void load_noise(const Args<T>& a, const I& item, Wide<T> (&to)[I::kCount]) {
  if (a.seeds != nullptr)
    item.normals(a.seeds[item.image], 0, kStreamReparameterize, to);
  else
    item.load(a.noise, to);
}

// exp(logvar) + mu² - 1 - logvar, in roundings that no compiler joins
template <typename W>
__device__ __forceinline__ W twice_kl(W sigma, W mu, W logvar) {
  return add_rn(add_rn(add_product(mul_rn(sigma, sigma), mu, mu), W(-1)), -logvar);
}

// z [N, *]; parts [N, blocks], the share in the KL of each block's items
template <typename T, int kWalk>
__global__ void __launch_bounds__(kThreads, 1)
    reparameterize_fwd_kernel(const Args<T> a, T* z, Wide<T>* parts, int64_t blocks) {
  using I = Item<T, kWalk>;
  using W = Wide<T>;
  for (int64_t job = blockIdx.x; job < a.images.count * blocks; job += gridDim.x) {
    const int64_t image = quotient(job, blocks), first = (job - image * blocks) * kItems * blockDim.x + threadIdx.x;
    W kl = 0;
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = first + k * blockDim.x;
      if (i >= a.images.items) break;
      const I item(a.images, image, i);
      W mu[I::kCount], logvar[I::kCount], noise[I::kCount];
      load_noise(a, item, noise);  // first: its square root is a call, around which little should have to be kept
      item.load(a.mu, mu);
      item.load(a.logvar, logvar);
#pragma unroll
      for (int j = 0; j < I::kCount; ++j) {
        const W sigma = exp_(logvar[j] * W(0.5));
        kl = add_rn(kl, twice_kl(sigma, mu[j], logvar[j]));  // 0 beyond the item's count, where mu = logvar = 0
        mu[j] = add_product(mu[j], sigma, noise[j]);
      }
      item.store(z, mu);
    }
    kl = block_sum(kl);
    if (threadIdx.x == 0) parts[job] = W(0.5) * kl;
  }
}

// parts [N, blocks] -> kl [N], a warp an image
template <typename W>
__global__ void __launch_bounds__(32, 1) reparameterize_sum_kernel(const W* parts, W* kl, int64_t images, int64_t blocks) {
  for (int64_t n = blockIdx.x; n < images; n += gridDim.x) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += 32) sum += parts[n * blocks + i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) kl[n] = static_cast<W>(sum);
  }
}

// dmu = dz + dkl mu;  dlogvar = 1/2 (dz noise exp(logvar/2) + dkl (exp(logvar) - 1)). dz [N, *] or null, dkl [N] or null
template <typename T, int kWalk>
__global__ void __launch_bounds__(kThreads, 1)
    reparameterize_bwd_kernel(const Args<T> a, const T* dz, const Wide<T>* dkl, T* dmu, T* dlogvar) {
  using I = Item<T, kWalk>;
  using W = Wide<T>;
  for (int64_t i = first_item(); i < a.images.count * a.images.items; i += item_stride()) {
    const I item(a.images, i);
    W d[I::kCount] = {}, logvar[I::kCount], noise[I::kCount] = {}, mu[I::kCount] = {}, g = 0;
    if (dz != nullptr) {
      load_noise(a, item, noise);  // first, as above
      item.load(dz, d);
    }
    item.load(a.logvar, logvar);
    if (dkl != nullptr) {
      item.load(a.mu, mu);
      g = dkl[item.image];
    }
#pragma unroll
    for (int j = 0; j < I::kCount; ++j) {
      const W sigma = exp_(logvar[j] * W(0.5));
      const W by_kl = mul_rn(g, add_rn(mul_rn(sigma, sigma), W(-1)));
      mu[j] = add_product(d[j], g, mu[j]);
      logvar[j] = W(0.5) * add_product(by_kl, mul_rn(d[j], noise[j]), sigma);
    }
    item.store(dmu, mu);
    item.store(dlogvar, logvar);
  }
}

// Threads of a block that walks over `items` of one image: whole warps, no more than there is work for.
int threads_for(int64_t items) {
  return static_cast<int>(std::min<int64_t>(kThreads, (items + 31) / 32 * 32));
}

// mu, logvar, noise, z: [N, *] in one dense layout; seeds: int64 [N]; kl: [N] fp32 (fp64 for fp64)
void reparameterize_fwd(const Tensor& mu, const Tensor& logvar, const OptTensor& noise, const OptTensor& seeds,
                        const Tensor& z, const Tensor& kl) {
  if (mu.size(0) == 0) return;
  const Gpu gpu(mu);
  const auto sum = [&](const Tensor& parts, int64_t blocks) {
    const int64_t images = mu.size(0);
    const auto grid = static_cast<unsigned>(std::min<int64_t>(images, 1 << 24));
    if (mu.scalar_type() == torch::headeronly::ScalarType::Double)
      launch(reparameterize_sum_kernel<double>, grid, 32, 0, gpu.stream, in<double>(parts), out<double>(kl), images,
             blocks);
    else
      launch(reparameterize_sum_kernel<float>, grid, 32, 0, gpu.stream, in<float>(parts), out<float>(kl), images,
             blocks);
  };
  if (mu.numel() == 0) return sum(kl, 0);
  for_dtype(mu, "reparameterize", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    Args<T> a{{}, in<T>(mu), in<T>(logvar), in<T>(noise), device_scalars(seeds, "seeds")};
    for_walk<T>(mu, true, {a.mu, a.logvar, a.noise, in<T>(z)}, [&](auto walk, const Images& images) {
      a.images = images;
      const int threads = threads_for(images.items);
      const int64_t blocks = (images.items + kItems * threads - 1) / (kItems * threads);
      const Tensor parts = blocks == 1 ? kl : torch::stable::new_empty(kl, {images.count * blocks});
      const auto grid = static_cast<unsigned>(std::min<int64_t>(images.count * blocks, 1 << 24));
      launch(reparameterize_fwd_kernel<T, walk()>, grid, threads, 0, gpu.stream, a, out<T>(z), out<W>(parts), blocks);
      if (blocks > 1) sum(parts, blocks);
    });
  });
}

// dz: [N, *] or none; dkl: [N] or none; dmu, dlogvar: [N, *]; the rest as in the forward
void reparameterize_bwd(const OptTensor& dz, const OptTensor& dkl, const Tensor& mu, const Tensor& logvar,
                        const OptTensor& noise, const OptTensor& seeds, const Tensor& dmu, const Tensor& dlogvar) {
  if (mu.numel() == 0) return;
  const Gpu gpu(mu);
  for_dtype(mu, "reparameterize_bwd", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    Args<T> a{{}, in<T>(mu), in<T>(logvar), in<T>(noise), device_scalars(seeds, "seeds")};
    for_walk<T>(mu, seeds.has_value() && dz.has_value(), {a.mu, a.logvar, a.noise, in<T>(dz), in<T>(dmu), in<T>(dlogvar)},
                [&](auto walk, const Images& images) {
                  a.images = images;
                  launch(reparameterize_bwd_kernel<T, walk()>, blocks_for(images.count * images.items), kThreads, 0,
                         gpu.stream, a, in<T>(dz), in<W>(dkl), out<T>(dmu), out<T>(dlogvar));
                });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "reparameterize_fwd(Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, Tensor(a!) z, Tensor(b!) kl) -> ()");
  m.def(
      "reparameterize_bwd(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, "
      "Tensor(a!) dmu, Tensor(b!) dlogvar) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) {
  m.impl("reparameterize_fwd", TORCH_BOX(&fastgen::reparameterize_fwd));
  m.impl("reparameterize_bwd", TORCH_BOX(&fastgen::reparameterize_bwd));
}
