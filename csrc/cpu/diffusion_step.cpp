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
  uint64_t seed;
  uint32_t step;
  bool seeded;
  Wide<T> guidance, clip;  // clip: infinity where there is none
  int keep;
};

template <typename T, typename M>
FASTGEN_BODY void forward_body(const Args<T, M>& a, const StepCoefficients<Wide<T>>& c, Span s) {
  using W = Wide<T>;
  NoiseBuffer buffer;
  const float* made = a.seeded ? fill_normals(a.seed, a.step, kStreamStep, s.first, s.count, buffer) : nullptr;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t j = s.offset + i * s.stride;
    W m = static_cast<W>(a.uncond[j]);
    if (a.cond != nullptr) m = m + a.guidance * (static_cast<W>(a.cond[j]) - m);
    const W h = a.history != nullptr ? static_cast<W>(a.history[j]) : W(0);
    const W n = made != nullptr ? static_cast<W>(made[i]) : a.noise != nullptr ? static_cast<W>(a.noise[j]) : W(0);
    const StepResult<W> r = diffusion_step(c, static_cast<W>(a.x[j]), m, h, n, a.clip);
    a.next[j] = static_cast<T>(r.next);
    if (a.kept != nullptr) a.kept[j] = static_cast<T>(a.keep == 1 ? r.x0 : r.eps);
  }
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
                  0, static_cast<uint32_t>(step), seeds.has_value(), W(1),
                  clip ? static_cast<W>(*clip) : std::numeric_limits<W>::infinity(), static_cast<int>(keep)};
  for_spans(seeds ? rows_of(x_t) : flat(x_t), [&](const Span& s) {
    Args<T, M> a = args;
    if (seeds) a.seed = static_cast<uint64_t>(in<int64_t>(seeds)[s.image]);
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
