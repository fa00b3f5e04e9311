// The activations of fused ops and their derivatives, for host and device. Codes: fastgen/ops/activations.py.
//
// fp32 on the host takes polynomials that a compiler can vectorise (libm calls it cannot); fp64 takes libm,
// so that gradient checks see full precision. NaN and infinities come out as eager PyTorch has them.
#pragma once

#include "philox.h"  // FASTGEN_HD, float_bits, bits_float

namespace fastgen {

enum Act : int { kNone, kRelu, kLeakyRelu, kSilu, kGelu, kGeluTanh, kTanh, kSigmoid };

constexpr double kNegativeSlope = 0.01;

#ifdef __CUDA_ARCH__
FASTGEN_HD float exp_(float x) { return expf(x); }
FASTGEN_HD float erf_(float x) { return erff(x); }
#else
// exp to 2 ulp: x = n ln 2 + r, Cephes' polynomial in r, then n goes into the exponent bits.
FASTGEN_HD float exp_(float x) {
  const float bounded = x > 88.8f ? 88.8f : x;  // rounds to n = 128, whose exponent bits are infinity's
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // + 1.5 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * r * r + r) + 1.0f;
  const float scale = bits_float((float_bits(shifted) - float_bits(12582912.0f) + 127u) << 23);
  return x < -87.3f ? 0.0f : y * scale;  // below the smallest normal number: 0
}
// erf by a rational function of x on [-4, 4], beyond which it is +-1 in fp32 (the form of Eigen's and XLA's).
FASTGEN_HD float erf_(float x) {
  const float a = x > 4.0f ? 4.0f : x, b = a < -4.0f ? -4.0f : a;
  const float z = b * b;
  float p = -2.72614225801306e-10f;
  p = p * z + 2.77068142495902e-08f;
  p = p * z + -2.10102402082508e-06f;
  p = p * z + -5.69250639462346e-05f;
  p = p * z + -7.34990630326855e-04f;
  p = p * z + -2.95459980854025e-03f;
  p = p * z + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * z + -2.13374055278905e-04f;
  q = q * z + -1.68282697438203e-03f;
  q = q * z + -7.37332916720468e-03f;
  q = q * z + -1.42647390514189e-02f;
  return b * p / q;
}
#endif
FASTGEN_HD double exp_(double x) { return exp(x); }
FASTGEN_HD double erf_(double x) { return erf(x); }

template <typename T>
FASTGEN_HD T sigmoid_(T x) {
  return T(1) / (T(1) + exp_(-x));
}
// 1 - 2 / (e^2x + 1): in fp32 the absolute error near 0 is 6e-8, of the size of one rounding of the result's scale.
FASTGEN_HD float tanh_(float x) { return 1.0f - 2.0f / (exp_(2.0f * x) + 1.0f); }
FASTGEN_HD double tanh_(double x) { return tanh(x); }

template <typename T>
FASTGEN_HD T gelu_tanh_inner(T x) {
  return T(0.7978845608028654) * (x + T(0.044715) * x * x * x);
}

template <int kAct, typename T>
FASTGEN_HD T act(T x) {
  if constexpr (kAct == kRelu) return x < T(0) ? T(0) : x;
  if constexpr (kAct == kLeakyRelu) return x < T(0) ? x * T(kNegativeSlope) : x;
  if constexpr (kAct == kSilu) return x * sigmoid_(x);
  if constexpr (kAct == kGelu) return T(0.5) * x * (T(1) + erf_(x * T(0.7071067811865476)));
  if constexpr (kAct == kGeluTanh) return T(0.5) * x * (T(1) + tanh_(gelu_tanh_inner(x)));
  if constexpr (kAct == kTanh) return tanh_(x);
  if constexpr (kAct == kSigmoid) return sigmoid_(x);
  return x;
}

template <int kAct, typename T>
FASTGEN_HD T act_grad(T x) {
  if constexpr (kAct == kRelu) return x > T(0) ? T(1) : T(0);
  if constexpr (kAct == kLeakyRelu) return x > T(0) ? T(1) : T(kNegativeSlope);
  if constexpr (kAct == kSilu) {
    const T s = sigmoid_(x);
    return s * (T(1) + x * (T(1) - s));
  }
  if constexpr (kAct == kGelu) {
    const T cdf = T(0.5) * (T(1) + erf_(x * T(0.7071067811865476)));
    return cdf + x * T(0.3989422804014327) * exp_(T(-0.5) * x * x);
  }
  if constexpr (kAct == kGeluTanh) {
    const T t = tanh_(gelu_tanh_inner(x));
    const T inner_grad = T(0.7978845608028654) * (T(1) + T(3 * 0.044715) * x * x);
    return T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * inner_grad;
  }
  if constexpr (kAct == kTanh) {
    const T t = tanh_(x);
    return T(1) - t * t;
  }
  if constexpr (kAct == kSigmoid) {
    const T s = sigmoid_(x);
    return s * (T(1) - s);
  }
  return T(1);
}

}  // namespace fastgen
