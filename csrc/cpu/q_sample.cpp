// q_sample: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; see fastgen/ops/q_sample.py.
#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

// x0, noise, x_t, noise_out: the span's first element; a, b: the image's coefficients
template <typename T>
FASTGEN_BODY void forward_body(const T* x0, Wide<T> a, Wide<T> b, const T* noise, uint64_t seed, uint32_t t, T* x_t,
                               T* noise_out, Span s) {
  using W = Wide<T>;
  NoiseBuffer buffer;
  const float* made = nullptr;
  if (noise == nullptr) made = fill_normals(seed, t, kStreamQSample, s.first, s.count, buffer);
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t j = i * s.stride;
    const W n = made != nullptr ? static_cast<W>(made[i]) : static_cast<W>(noise[j]);
    x_t[j] = static_cast<T>(a * static_cast<W>(x0[j]) + b * n);
  }
  if (made != nullptr)
    for (int64_t i = 0; i < s.count; ++i) noise_out[i * s.stride] = static_cast<T>(made[i]);
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
      multiversion<forward_body<T>>(
          in<T>(x0) + s.offset, static_cast<Wide<T>>(row[0]), static_cast<Wide<T>>(row[1]),
          noise ? in<T>(noise) + s.offset : nullptr,
          seeds ? static_cast<uint64_t>(in<int64_t>(seeds)[s.image]) : 0, static_cast<uint32_t>(steps[s.image]),
          out<T>(x_t) + s.offset, noise_out ? out<T>(noise_out) + s.offset : nullptr, s);
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
