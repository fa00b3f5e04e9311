// diffusion_step: guidance, predicted image, clip, update and noise in one pass; see fastgen/ops/diffusion_step.py.
#include "../common/diffusion_step.h"

#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

template <typename T, typename M>
struct Args {
  const T *x, *history, *noise;  // [N, *], the last two may be null
  const M *uncond, *cond;        // [N, *]; cond is null without guidance
  T *next, *kept;                // [N, *], kept may be null
  const float* made;  // the span's noise, made from a seed; may be null
  Wide<T> guidance, clip;  // clip: infinity where there is none
  int keep;
};

template <typename T, typename M>
FASTGEN_BODY void forward_body(const Args<T, M>& a, const StepCoefficients<Wide<T>>& c, Span s) {
  using W = Wide<T>;
  alignas(64) W buffers[6][kSpan];
  const W* x = gather(a.x + s.offset, s.count, s.stride, buffers[0]);
  const W* m = gather(a.uncond + s.offset, s.count, s.stride, buffers[1]);
  if (a.cond != nullptr) {
    const W* cond = gather(a.cond + s.offset, s.count, s.stride, buffers[2]);
#pragma omp simd
    for (int64_t i = 0; i < s.count; ++i) buffers[1][i] = m[i] + a.guidance * (cond[i] - m[i]);
    m = buffers[1];
  }
  const W *h = buffers[2], *n = buffers[3];
  if (a.history != nullptr)
    h = gather(a.history + s.offset, s.count, s.stride, buffers[2]);
  else
    std::fill_n(buffers[2], s.count, W(0));
  if (a.made != nullptr)
    n = gather(a.made, s.count, 1, buffers[3]);
  else if (a.noise != nullptr)
    n = gather(a.noise + s.offset, s.count, s.stride, buffers[3]);
  else
    std::fill_n(buffers[3], s.count, W(0));
  W* next = target(a.next + s.offset, s.stride, buffers[4]);
  W* kept = a.kept != nullptr ? target(a.kept + s.offset, s.stride, buffers[5]) : buffers[5];
#pragma omp simd
  for (int64_t i = 0; i < s.count; ++i) {
    const StepResult<W> r = diffusion_step(c, x[i], m[i], h[i], n[i], a.clip);
    next[i] = r.next;
    kept[i] = a.keep == 1 ? r.x0 : r.eps;
  }
  scatter(next, s.count, s.stride, a.next + s.offset);
  if (a.kept != nullptr) scatter(kept, s.count, s.stride, a.kept + s.offset);
}

template <typename T, typename M>
void run_typed(const Tensor& x_t, const Tensor& model_out, const Tensor& coefficients, int64_t step,
         const OptTensor& guidance, std::optional<double> clip, const OptTensor& history, int64_t keep,
         const OptTensor& noise, const OptTensor& seeds, const Tensor& x_next, const OptTensor& history_out) {
  using W = Wide<T>;
  const float* row = in<float>(coefficients) + 9 * step;
  const StepCoefficients<W> c{{row[0], row[1], row[2], row[3]}, {row[4], row[5], row[6], row[7], row[8]}};
  Args<T, M> args{in<T>(x_t), in<T>(history), in<T>(noise), in<M>(model_out),
                  guidance ? in<M>(model_out) + x_t.numel() : nullptr, out<T>(x_next), out<T>(history_out),
                  nullptr, W(1),
                  clip ? static_cast<W>(*clip) : std::numeric_limits<W>::infinity(), static_cast<int>(keep)};
  for_spans(seeds ? rows_of(x_t) : flat(x_t), [&](const Span& s) {
    Args<T, M> a = args;
    NoiseBuffer buffer;
    if (seeds)
      a.made = fill_normals(static_cast<uint64_t>(in<int64_t>(seeds)[s.image]), static_cast<uint32_t>(step),
                            kStreamStep, s.first, s.count, buffer);
    if (guidance) a.guidance = in<W>(guidance)[guidance->numel() == 1 ? 0 : s.image];
    multiversion<forward_body<T, M>>(a, c, s);
  });
}

// The network may answer in another dtype (bf16 autocast, say) than the image is kept in.
template <typename T, typename... Args>
void run(const Tensor& x_t, const Tensor& model_out, const Args&... args) {
  for_dtype(model_out, "diffusion_step",
            [&](auto zero) { run_typed<T, decltype(zero)>(x_t, model_out, args...); });
}

// x_t, history, noise, x_next, history_out: [N, *] in one dense layout; model_out: [N, *] or [2N, *] in the same;
// coefficients: fp32 [S, 9]; step: int64 []; guidance: [] or [N], fp32 (fp64 for fp64); seeds: int64 [N]
void diffusion_step_fwd(const Tensor& x_t, const Tensor& model_out, const Tensor& coefficients, const Tensor& step,
                        const OptTensor& guidance, std::optional<double> clip, const OptTensor& history, int64_t keep,
                        const OptTensor& noise, const OptTensor& seeds, const Tensor& x_next,
                        const OptTensor& history_out) {
  const int64_t row = *in<int64_t>(step);
  STD_TORCH_CHECK(row >= 0 && row < coefficients.size(0), "step must be in 0 … ", coefficients.size(0) - 1, ", not ", row);
  for_dtype(x_t, "diffusion_step", [&](auto zero) {
    using T = decltype(zero);
    run<T>(x_t, model_out, coefficients, row, guidance, clip, history, keep, noise, seeds, x_next, history_out);
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "diffusion_step_fwd(Tensor x_t, Tensor model_out, Tensor coefficients, Tensor step, Tensor? guidance, "
      "float? clip, Tensor? history, int keep, Tensor? noise, Tensor? seeds, Tensor(a!) x_next, "
      "Tensor(b!)? history_out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("diffusion_step_fwd", TORCH_BOX(&fastgen::diffusion_step_fwd));
}
