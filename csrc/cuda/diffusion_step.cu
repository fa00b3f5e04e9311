// diffusion_step: guidance, predicted image, clip, update and noise in one pass; see fastgen/ops/diffusion_step.py.
//
// Limit: memory, one read of x and model_out (twice that with guidance) and history, one write of x_next and
// history_out. 64 MB of x in fp32 with model_out in bf16, noise from seeds: 160 MB, 33 us on an H200 (4.8 TB/s).
// Philox and Box-Muller are some 40 instructions an element, 17 operations more for the step: 16 M elements take
// 30 us of the issue slots of 132 SMs. In bf16 throughout (96 MB for 32 M elements' worth of 64 MB) noise, not memory,
// is the limit: 61 us against 40 us.
#include <cmath>

#include "common/diffusion_step.h"
#include "images.cuh"

namespace fastgen {
namespace {

enum class Dtype : int { f32, f64, f16, bf16 };
template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, float>    ? Dtype::f32
                           : std::is_same_v<T, double> ? Dtype::f64
                           : std::is_same_v<T, __half> ? Dtype::f16
                                                       : Dtype::bf16;

template <typename T>
struct Args {
  Images images;
  const T *x, *history, *noise;     // [N, *], the last two may be null
  const void *uncond, *cond;        // [N, *] of dtype `model`; cond is null without guidance
  const Wide<T>* guidance;          // [] or [N]
  const float* coefficients;        // [S, 9]
  const int64_t *step, *seeds;      // [], [N] or null
  T *next, *kept;                   // [N, *], kept may be null
  Wide<T> clip;                     // infinity where there is none
  Dtype model;
  bool guidance_per_image, keep_x0;
};

// The network may answer in another dtype than the image is kept in. In vectors: the same, or half precision for an
// image in fp32, as under autocast.
template <typename T, typename I>
__device__ __forceinline__ void load_model(const I& item, const void* p, Dtype dtype, Wide<T> (&to)[I::kCount]) {
  if (dtype == dtype_of<T>) return item.load(static_cast<const T*>(p), to);
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == Dtype::f16) return item.load(static_cast<const __half*>(p), to);
    if (dtype == Dtype::bf16) return item.load(static_cast<const __nv_bfloat16*>(p), to);
  }
  item.load_each(
      [&](int64_t i) {
        switch (dtype) {
          case Dtype::f32: return static_cast<double>(static_cast<const float*>(p)[i]);
          case Dtype::f64: return static_cast<const double*>(p)[i];
          case Dtype::f16: return static_cast<double>(widen(static_cast<const __half*>(p)[i]));
          default: return static_cast<double>(widen(static_cast<const __nv_bfloat16*>(p)[i]));
        }
      },
      to);
}

template <typename T, int kWalk>
__global__ void __launch_bounds__(kThreads, 1) diffusion_step_fwd_kernel(const Args<T> a) {
  using I = Item<T, kWalk>;
  using W = Wide<T>;
  const int64_t step = *a.step;
  const float* row = a.coefficients + 9 * step;
  StepCoefficients<W> c;
#pragma unroll
  for (int j = 0; j < 4; ++j) c.p[j] = row[j];
#pragma unroll
  for (int j = 0; j < 5; ++j) c.q[j] = row[4 + j];
  for (int64_t i = first_item(); i < a.images.count * a.images.items; i += item_stride()) {
    const I item(a.images, i);
    W x[I::kCount], m[I::kCount], history[I::kCount] = {}, noise[I::kCount] = {};
    item.load(a.x, x);
    load_model<T>(item, a.uncond, a.model, m);
    if (a.cond != nullptr) {
      W cond[I::kCount];
      load_model<T>(item, a.cond, a.model, cond);
      const W g = a.guidance[a.guidance_per_image ? item.image : 0];
#pragma unroll
      for (int j = 0; j < I::kCount; ++j) m[j] = add_product(m[j], g, cond[j] - m[j]);
    }
    if (a.history != nullptr) item.load(a.history, history);
    if (a.seeds != nullptr)
      item.normals(a.seeds[item.image], step, kStreamStep, noise);
    else if (a.noise != nullptr)
      item.load(a.noise, noise);
#pragma unroll
    for (int j = 0; j < I::kCount; ++j) {
      const StepResult<W> r = diffusion_step(c, x[j], m[j], history[j], noise[j], a.clip);
      x[j] = r.next;
      m[j] = a.keep_x0 ? r.x0 : r.eps;
    }
    item.store(a.next, x);
    if (a.kept != nullptr) item.store(a.kept, m);
  }
}

// x_t, history, noise, x_next, history_out: [N, *] in one dense layout; model_out: [N, *] or [2N, *] in the same;
// coefficients: fp32 [S, 9]; step: int64 [], in 0 … S-1 (not checked: that would wait for the GPU);
// guidance: [] or [N], fp32 (fp64 for fp64); seeds: int64 [N]
void diffusion_step_fwd(const Tensor& x_t, const Tensor& model_out, const Tensor& coefficients, const Tensor& step,
                        const OptTensor& guidance, std::optional<double> clip, const OptTensor& history, int64_t keep,
                        const OptTensor& noise, const OptTensor& seeds, const Tensor& x_next,
                        const OptTensor& history_out) {
  if (x_t.numel() == 0) return;
  const Gpu gpu(x_t);
  for_dtype(x_t, "diffusion_step", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    Dtype model{};
    for_dtype(model_out, "diffusion_step", [&](auto m) { model = dtype_of<decltype(m)>; });
    const auto* uncond = static_cast<const char*>(model_out.const_data_ptr());
    Args<T> a{{},
              in<T>(x_t),
              in<T>(history),
              in<T>(noise),
              uncond,
              guidance ? uncond + x_t.numel() * model_out.element_size() : nullptr,
              in<W>(guidance),
              in<float>(coefficients),
              device_scalars(step, "step"),
              device_scalars(seeds, "seeds"),
              out<T>(x_next),
              keep == 0 ? nullptr : out<T>(history_out),
              clip ? static_cast<W>(*clip) : static_cast<W>(INFINITY),
              model,
              guidance && guidance->numel() > 1,
              keep == 1};
    for_walk<T>(x_t, seeds.has_value(), {a.x, a.history, a.noise, a.uncond, a.cond, a.next, a.kept},
                [&](auto walk, const Images& images) {
                  a.images = images;
                  launch(diffusion_step_fwd_kernel<T, walk()>, blocks_for(images.count * images.items), kThreads, 0,
                         gpu.stream, a);
                });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "diffusion_step_fwd(Tensor x_t, Tensor model_out, Tensor coefficients, Tensor step, Tensor? guidance, "
      "float? clip, Tensor? history, int keep, Tensor? noise, Tensor? seeds, Tensor(a!) x_next, "
      "Tensor(b!)? history_out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) {
  m.impl("diffusion_step_fwd", TORCH_BOX(&fastgen::diffusion_step_fwd));
}
