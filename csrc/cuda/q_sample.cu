// q_sample: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; see fastgen/ops/q_sample.py.
//
// Limit: memory, one read of x0 and one write of x_t and of the noise (a read, where it is given). 64 MB of x0: 192 MB,
// 40 us on an H200 (4.8 TB/s). Noise takes some 40 instructions an element: 30 us for 16 M elements in fp32, but 61 us
// for the 32 M of bf16, where it is the limit.
#include "images.cuh"

namespace fastgen {
namespace {

template <typename T>
struct Args {
  Images images;
  const T *x0, *noise;        // [N, *], noise may be null
  const int64_t *t, *seeds;   // [N], seeds may be null
  const float* table;         // [steps, 2]
  T *x_t, *noise_out;         // [N, *], noise_out may be null
};

template <typename T, int kWalk>
__global__ void __launch_bounds__(kThreads, 1) q_sample_fwd_kernel(const Args<T> a) {
  using I = Item<T, kWalk>;
  using W = Wide<T>;
  for (int64_t i = first_item(); i < a.images.count * a.images.items; i += item_stride()) {
    const I item(a.images, i);
    const int64_t t = a.t[item.image];
    const W signal = a.table[2 * t], sigma = a.table[2 * t + 1];
    W x[I::kCount], noise[I::kCount];
    item.load(a.x0, x);
    if (a.seeds != nullptr)
      item.normals(a.seeds[item.image], t, kStreamQSample, noise);
    else
      item.load(a.noise, noise);
#pragma unroll
    for (int j = 0; j < I::kCount; ++j) x[j] = add_product(mul_rn(signal, x[j]), sigma, noise[j]);
    item.store(a.x_t, x);
    if (a.noise_out != nullptr) item.store(a.noise_out, noise);
  }
}

// x0, noise, x_t, noise_out: [N, *] in one dense layout; t: int64 [N], in 0 … T-1 (not checked: that would wait for
// the GPU); seeds: int64 [N]; table: fp32 [T, 2]
void q_sample_fwd(const Tensor& x0, const Tensor& t, const Tensor& table, const OptTensor& noise,
                  const OptTensor& seeds, const Tensor& x_t, const OptTensor& noise_out) {
  if (x0.numel() == 0) return;
  const Gpu gpu(x0);
  for_dtype(x0, "q_sample", [&](auto zero) {
    using T = decltype(zero);
    Args<T> a{{},
              in<T>(x0),
              in<T>(noise),
              device_scalars(t, "t"),
              device_scalars(seeds, "seeds"),
              in<float>(table),
              out<T>(x_t),
              out<T>(noise_out)};
    for_walk<T>(x0, seeds.has_value(), {a.x0, a.noise, a.x_t, a.noise_out}, [&](auto walk, const Images& images) {
      a.images = images;
      launch(q_sample_fwd_kernel<T, walk()>, blocks_for(images.count * images.items), kThreads, 0, gpu.stream, a);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "q_sample_fwd(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, Tensor(a!) x_t, "
      "Tensor(b!)? noise_out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("q_sample_fwd", TORCH_BOX(&fastgen::q_sample_fwd)); }
