// reparameterize: z = mu + exp(logvar/2) noise and KL(N(mu, sigma²) || N(0, I)); see fastgen/ops/reparameterize.py.
#include <vector>

#include "activations.h"
#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

template <typename W>
FASTGEN_BODY void standard_deviation(const W* logvar, int64_t n, W* sigma) {
  for (int64_t i = 0; i < n; ++i) sigma[i] = logvar[i] * W(0.5);
  exponential(sigma, n);
}

// mu, logvar, noise, z: the span's first element; made: the span's noise if it was made from a seed. Returns the
// span's part of the KL, in nats.
template <typename T>
FASTGEN_BODY Wide<T> forward_body(const T* mu, const T* logvar, const T* noise, const float* made, T* z, Span s) {
  using W = Wide<T>;
  alignas(64) W buffers[4][kSpan];
  alignas(64) W sigma[kSpan], kl[kSpan];
  const W* m = gather(mu, s.count, s.stride, buffers[0]);
  const W* v = gather(logvar, s.count, s.stride, buffers[1]);
  const W* n = made != nullptr ? gather(made, s.count, 1, buffers[2]) : gather(noise, s.count, s.stride, buffers[2]);
  W* result = target(z, s.stride, buffers[3]);
  standard_deviation(v, s.count, sigma);
#pragma omp simd
  for (int64_t i = 0; i < s.count; ++i) {
    result[i] = m[i] + sigma[i] * n[i];
    kl[i] = sigma[i] * sigma[i] + m[i] * m[i] - W(1) - v[i];
  }
  scatter(result, s.count, s.stride, z);
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < s.count; ++i) sum += kl[i];
  return W(0.5) * sum;
}

// dmu = dz + dkl mu;  dlogvar = 1/2 (dz noise exp(logvar/2) + dkl (exp(logvar) - 1)). dz may be null.
template <typename T>
FASTGEN_BODY void backward_body(const T* dz, Wide<T> dkl, const T* mu, const T* logvar, const T* noise,
                                const float* made, T* dmu, T* dlogvar, Span s) {
  using W = Wide<T>;
  alignas(64) W buffers[6][kSpan];
  const W* d = buffers[0];
  if (dz != nullptr)
    d = gather(dz, s.count, s.stride, buffers[0]);
  else
    std::fill_n(buffers[0], s.count, W(0));
  const W* m = gather(mu, s.count, s.stride, buffers[1]);
  const W* v = gather(logvar, s.count, s.stride, buffers[2]);
  const W* n = made != nullptr ? gather(made, s.count, 1, buffers[3]) : gather(noise, s.count, s.stride, buffers[3]);
  W *dm = target(dmu, s.stride, buffers[4]), *dv = target(dlogvar, s.stride, buffers[5]);
  alignas(64) W sigma[kSpan];
  standard_deviation(v, s.count, sigma);
#pragma omp simd
  for (int64_t i = 0; i < s.count; ++i) {
    dm[i] = d[i] + dkl * m[i];
    dv[i] = W(0.5) * (d[i] * n[i] * sigma[i] + dkl * (sigma[i] * sigma[i] - W(1)));
  }
  scatter(dm, s.count, s.stride, dmu);
  scatter(dv, s.count, s.stride, dlogvar);
}

// The noise of a span from its image's seed, or null where noise is given.
const float* made_noise(const OptTensor& seeds, const Span& s, NoiseBuffer& buffer) {
  if (!seeds) return nullptr;
  const uint64_t seed = static_cast<uint64_t>(in<int64_t>(seeds)[s.image]);
  return fill_normals(seed, 0, kStreamReparameterize, s.first, s.count, buffer);
}

Rows rows_for(const Tensor& x, const OptTensor& seeds) { return seeds ? rows_of(x) : flat(x); }

// mu, logvar, noise, z: [N, *] in one dense layout; seeds: int64 [N]; kl: [N] fp32 (fp64 for fp64)
void reparameterize_fwd(const Tensor& mu, const Tensor& logvar, const OptTensor& noise, const OptTensor& seeds,
                        const Tensor& z, const Tensor& kl) {
  const Rows rows = rows_of(mu);  // whatever the noise: the KL's order is one
  const int64_t lines = rows.size == 0 ? 0 : rows.size / rows.inner, pieces = (rows.inner + kSpan - 1) / kSpan;
  for_dtype(mu, "reparameterize", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    // One slot a span, summed in order: the KL does not depend on the number of threads.
    std::vector<W> parts(static_cast<size_t>(rows.images * lines * pieces));
    for_spans(rows, [&](const Span& s) {
      const int64_t line = s.first / rows.inner, piece = s.first % rows.inner / kSpan;
      NoiseBuffer buffer;
      parts[(s.image * lines + line) * pieces + piece] = multiversion<forward_body<T>>(
          in<T>(mu) + s.offset, in<T>(logvar) + s.offset, at(in<T>(noise), s.offset), made_noise(seeds, s, buffer),
          out<T>(z) + s.offset, s);
    });
    for (int64_t n = 0; n < mu.size(0); ++n) {
      double sum = 0;
      for (int64_t i = 0; i < lines * pieces; ++i) sum += parts[n * lines * pieces + i];
      out<W>(kl)[n] = static_cast<W>(sum);
    }
  });
}

// dz: [N, *] or none; dkl: [N] or none; dmu, dlogvar: [N, *]; the rest as in the forward
void reparameterize_bwd(const OptTensor& dz, const OptTensor& dkl, const Tensor& mu, const Tensor& logvar,
                        const OptTensor& noise, const OptTensor& seeds, const Tensor& dmu, const Tensor& dlogvar) {
  for_dtype(mu, "reparameterize_bwd", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    for_spans(rows_for(mu, seeds), [&](const Span& s) {
      const W g = dkl ? in<W>(dkl)[s.image] : W(0);
      NoiseBuffer buffer;
      multiversion<backward_body<T>>(at(in<T>(dz), s.offset), g, in<T>(mu) + s.offset, in<T>(logvar) + s.offset,
                                     at(in<T>(noise), s.offset), made_noise(seeds, s, buffer),
                                     out<T>(dmu) + s.offset, out<T>(dlogvar) + s.offset, s);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "reparameterize_fwd(Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, Tensor(a!) z, Tensor(b!) kl) -> ()");
  m.def(
      "reparameterize_bwd(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor? noise, Tensor? seeds, "
      "Tensor(a!) dmu, Tensor(b!) dlogvar) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("reparameterize_fwd", TORCH_BOX(&fastgen::reparameterize_fwd));
  m.impl("reparameterize_bwd", TORCH_BOX(&fastgen::reparameterize_bwd));
}
