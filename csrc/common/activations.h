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
FASTGEN_HD float erfc_(float x) { return erfcf(x); }
// 1 / x to 1 ulp, for x >= 1; division proper goes out of its way for numbers that do not come up here.
FASTGEN_HD float inverse_(float x) { return __fdividef(1.0f, x); }
// sigmoid_ for results that are rounded to half precision: two instructions of the GPU's, error below 1e-6.
FASTGEN_HD float short_sigmoid(float x) { return inverse_(1.0f + __expf(-x)); }
#else
FASTGEN_HD float inverse_(float x) { return 1.0f / x; }
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
// erfc to 1.2e-7 of its value (Press et al., Numerical Recipes, section 6.2): also where erf is all but +-1.
FASTGEN_HD float erfc_(float x) {
  const float a = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.5f * a);
  float p = 0.17087277f;
  p = p * t + -0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t + -1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t + -0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t + -1.26551223f;
  const float tail = t * exp_(p - a * a);
  return x < 0.0f ? 2.0f - tail : tail;
}
#endif
FASTGEN_HD double exp_(double x) { return exp(x); }
FASTGEN_HD double erfc_(double x) { return erfc(x); }
FASTGEN_HD double inverse_(double x) { return 1.0 / x; }

template <typename T>
FASTGEN_HD T sigmoid_(T x) {
  return inverse_(T(1) + exp_(-x));
}
#ifndef __CUDA_ARCH__
FASTGEN_HD float short_sigmoid(float x) { return sigmoid_(x); }
#endif
// s and 1 - s for s = sigmoid(x), neither by cancellation.
template <typename T>
FASTGEN_HD void sigmoid_pair(T x, T& s, T& rest) {
  const T e = exp_(-x);
  s = inverse_(T(1) + e);
  rest = x > T(0) ? e * s : T(1) - s;
}
// 1 - 2 / (e^2x + 1): in fp32 the absolute error near 0 is 6e-8, of the size of one rounding of the result's scale.
FASTGEN_HD float tanh_(float x) { return 1.0f - 2.0f * inverse_(exp_(2.0f * x) + 1.0f); }
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
  if constexpr (kAct == kGelu) return T(0.5) * x * erfc_(x * T(-0.7071067811865476));
  if constexpr (kAct == kGeluTanh) return x * sigmoid_(T(2) * gelu_tanh_inner(x));  // (1 + tanh u) / 2 = sigmoid(2u)
  if constexpr (kAct == kTanh) return tanh_(x);
  if constexpr (kAct == kSigmoid) return sigmoid_(x);
  return x;
}

template <int kAct, typename T>
FASTGEN_HD T act_grad(T x) {
  if constexpr (kAct == kRelu) return x > T(0) ? T(1) : T(0);
  if constexpr (kAct == kLeakyRelu) return x > T(0) ? T(1) : T(kNegativeSlope);
  if constexpr (kAct == kSilu) {
    T s, rest;
    sigmoid_pair(x, s, rest);
    return s * (T(1) + x * rest);
  }
  if constexpr (kAct == kGelu) {
    const T cdf = T(0.5) * erfc_(x * T(-0.7071067811865476));
    return cdf + x * T(0.3989422804014327) * exp_(T(-0.5) * x * x);
  }
  if constexpr (kAct == kGeluTanh) {
    T s, rest;
    sigmoid_pair(T(2) * gelu_tanh_inner(x), s, rest);
    return s + T(2) * x * s * rest * T(0.7978845608028654) * (T(1) + T(3 * 0.044715) * x * x);
  }
  if constexpr (kAct == kTanh) {
    T s, rest;
    sigmoid_pair(T(2) * x, s, rest);
    return T(4) * s * rest;  // 1 - tanh² would cancel
  }
  if constexpr (kAct == kSigmoid) {
    T s, rest;
    sigmoid_pair(x, s, rest);
    return s * rest;
  }
  return T(1);
}

}  // namespace fastgen
