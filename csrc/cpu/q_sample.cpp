// q_sample: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; see fastgen/ops/q_sample.py.
#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

// x0, noise, x_t, noise_out: the span's first element; a, b: the image's coefficients; made: the span's noise if it
// was made from a seed
template <typename T>
FASTGEN_BODY void forward_body(const T* x0, Wide<T> a, Wide<T> b, const T* noise, const float* made, T* x_t,
                               T* noise_out, Span s) {
  using W = Wide<T>;
  alignas(64) W buffers[3][kSpan];
  const W* x = gather(x0, s.count, s.stride, buffers[0]);
  const W* n = made != nullptr ? gather(made, s.count, 1, buffers[1]) : gather(noise, s.count, s.stride, buffers[1]);
  W* result = target(x_t, s.stride, buffers[2]);
#pragma omp simd
  for (int64_t i = 0; i < s.count; ++i) result[i] = a * x[i] + b * n[i];
  scatter(result, s.count, s.stride, x_t);
  if (made != nullptr) scatter(made, s.count, s.stride, noise_out);
}

// x0, noise, x_t, noise_out: [N, *] in one dense layout; t, seeds: int64 [N]; table: fp32 [T, 2]
void q_sample_fwd(const Tensor& x0, const Tensor& t, const Tensor& table, const OptTensor& noise,
                  const OptTensor& seeds, const Tensor& x_t, const OptTensor& noise_out) {
  const int64_t* steps = in<int64_t>(t);
  for (int64_t n = 0; n < x0.size(0); ++n)
    STD_TORCH_CHECK(steps[n] >= 0 && steps[n] < table.size(0), "t[", n, "] must be in 0 … ", table.size(0) - 1,
                    ", not ", steps[n]);
  for_dtype(x0, "q_sample", [&](auto zero) {
    using T = decltype(zero);
    for_spans(seeds ? rows_of(x0) : flat(x0), [&](const Span& s) {
      const float* row = in<float>(table) + 2 * steps[s.image];
      NoiseBuffer buffer;
      const float* made = nullptr;
      if (seeds)
        made = fill_normals(static_cast<uint64_t>(in<int64_t>(seeds)[s.image]), static_cast<uint32_t>(steps[s.image]),
                            kStreamQSample, s.first, s.count, buffer);
      multiversion<forward_body<T>>(in<T>(x0) + s.offset, static_cast<Wide<T>>(row[0]), static_cast<Wide<T>>(row[1]),
                                    at(in<T>(noise), s.offset), made, out<T>(x_t) + s.offset,
                                    at(out<T>(noise_out), s.offset), s);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "q_sample_fwd(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, Tensor(a!) x_t, "
      "Tensor(b!)? noise_out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("q_sample_fwd", TORCH_BOX(&fastgen::q_sample_fwd)); }
