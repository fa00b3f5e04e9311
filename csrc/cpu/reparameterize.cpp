// reparameterize: z = mu + exp(logvar/2) noise and KL(N(mu, sigma²) || N(0, I)); see fastgen/ops/reparameterize.py.
#include <vector>

#include "../common/activations.h"
#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

// The noise of a span, densely: given (noise, at the span's first element), or made from the image's seed.
template <typename T>
FASTGEN_BODY void span_noise(const T* noise, const int64_t* seeds, const Span& s, Wide<T>* n) {
  if (seeds != nullptr) {
    NoiseBuffer buffer;
    const float* made =
        fill_normals(static_cast<uint64_t>(seeds[s.image]), 0, kStreamReparameterize, s.first, s.count, buffer);
    for (int64_t i = 0; i < s.count; ++i) n[i] = made[i];
  } else {
    for (int64_t i = 0; i < s.count; ++i) n[i] = static_cast<Wide<T>>(noise[i * s.stride]);
  }
}

template <typename T>
FASTGEN_BODY void forward_loop(const T* mu, const T* logvar, const Wide<T>* n, T* z, Wide<T>* kl, int64_t count,
                               int64_t stride) {
  using W = Wide<T>;
  for (int64_t i = 0; i < count; ++i) {
    const W m = static_cast<W>(mu[i * stride]), v = static_cast<W>(logvar[i * stride]);
    const W sigma = exp_(v * W(0.5));
    z[i * stride] = static_cast<T>(m + sigma * n[i]);
    kl[i] = sigma * sigma + m * m - W(1) - v;
  }
}

// mu, logvar, noise, z: the span's first element. Returns the span's part of the KL, in nats.
template <typename T>
FASTGEN_BODY Wide<T> forward_body(const T* mu, const T* logvar, const T* noise, const int64_t* seeds, T* z, Span s) {
  using W = Wide<T>;
  alignas(64) W n[kSpan];
  alignas(64) W kl[kSpan];
  span_noise(noise, seeds, s, n);
  if (s.stride == 1)  // the constant lets the compiler vectorise
    forward_loop(mu, logvar, n, z, kl, s.count, 1);
  else
    forward_loop(mu, logvar, n, z, kl, s.count, s.stride);
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < s.count; ++i) sum += kl[i];
  return W(0.5) * sum;
}

template <typename T>
FASTGEN_BODY void backward_loop(const T* dz, Wide<T> dkl, const T* mu, const T* logvar, const Wide<T>* n, T* dmu,
                                T* dlogvar, int64_t count, int64_t stride) {
  using W = Wide<T>;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = i * stride;
    const W d = dz != nullptr ? static_cast<W>(dz[j]) : W(0);
    const W sigma = exp_(static_cast<W>(logvar[j]) * W(0.5));
    dmu[j] = static_cast<T>(d + dkl * static_cast<W>(mu[j]));
    dlogvar[j] = static_cast<T>(W(0.5) * (d * n[i] * sigma + dkl * (sigma * sigma - W(1))));
  }
}

// dmu = dz + dkl mu;  dlogvar = 1/2 (dz noise exp(logvar/2) + dkl (exp(logvar) - 1)). dz may be null.
template <typename T>
FASTGEN_BODY void backward_body(const T* dz, Wide<T> dkl, const T* mu, const T* logvar, const T* noise,
                                const int64_t* seeds, T* dmu, T* dlogvar, Span s) {
  alignas(64) Wide<T> n[kSpan];
  span_noise(noise, seeds, s, n);
  if (s.stride == 1)
    backward_loop(dz, dkl, mu, logvar, n, dmu, dlogvar, s.count, 1);
  else
    backward_loop(dz, dkl, mu, logvar, n, dmu, dlogvar, s.count, s.stride);
}

template <typename T>
const T* at(const T* p, int64_t offset) {
  return p == nullptr ? nullptr : p + offset;
}

Rows rows_for(const Tensor& x, const OptTensor& seeds) { return seeds ? rows_of(x) : flat(x); }

// mu, logvar, noise, z: [N, *] in one dense layout; seeds: int64 [N]; kl: [N] fp32 (fp64 for fp64)
void reparameterize_fwd(const Tensor& mu, const Tensor& logvar, const OptTensor& noise, const OptTensor& seeds,
                        const Tensor& z, const Tensor& kl) {
  const Rows rows = rows_for(mu, seeds);
  const int64_t lines = rows.size == 0 ? 0 : rows.size / rows.inner, pieces = (rows.inner + kSpan - 1) / kSpan;
  for_dtype(mu, "reparameterize", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    // One slot a span, summed in order: the KL does not depend on the number of threads.
    std::vector<W> parts(static_cast<size_t>(rows.images * lines * pieces));
    for_spans(rows, [&](const Span& s) {
      const int64_t line = s.first / rows.inner, piece = s.first % rows.inner / kSpan;
      parts[(s.image * lines + line) * pieces + piece] = multiversion<forward_body<T>>(
          in<T>(mu) + s.offset, in<T>(logvar) + s.offset, at(in<T>(noise), s.offset),
          in<int64_t>(seeds), out<T>(z) + s.offset, s);
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
      multiversion<backward_body<T>>(at(in<T>(dz), s.offset), g, in<T>(mu) + s.offset,
                                            in<T>(logvar) + s.offset, at(in<T>(noise), s.offset),
                                            in<int64_t>(seeds), out<T>(dmu) + s.offset,
                                            out<T>(dlogvar) + s.offset, s);
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
