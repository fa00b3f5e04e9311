// The activations of bias_act with their first and second derivatives, for host and device, and its y = g(z),
// g(z) = clamp(gain act(z)), with g' and g''. Codes and equations: fastgen/ops/bias_act.py.
#pragma once

#include "activations.h"

namespace fastgen::bias_act {

enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kElu, kSelu, kSoftplus, kSwish };

constexpr double kSeluScale = 1.0507009873554804934193349852946;
constexpr double kSeluAlpha = 1.6732632423543772848170429916717;
constexpr double kSoftplusLinear = 20.0;  // from there on PyTorch's softplus is the identity

#ifdef __CUDA_ARCH__
FASTGEN_HD float expm1_(float x) { return expm1f(x); }
FASTGEN_HD float log1p_(float x) { return log1pf(x); }
#else
// exp(x) - 1 for x <= 0, as exp_ (activations.h), whose leading 1 is kept apart: nothing cancels near 0.
FASTGEN_HD float expm1_(float x) {
  const float above = x < -87.3f ? -87.3f : x;
  const float bounded = above > 0.0f ? 0.0f : above;
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = bits_float((float_bits(shifted) - float_bits(12582912.0f) + 127u) << 23);
  return (p * r * r + r) * scale + (scale - 1.0f);
}
// log(1 + x) for x in [0, 1]: 2 atanh(w), w = x / (2 + x) <= 1/3, by its series, which ends below an ulp.
FASTGEN_HD float log1p_(float x) {
  const float w = x / (2.0f + x), w2 = w * w;
  float p = 1.0f / 15;
  p = p * w2 + 1.0f / 13;
  p = p * w2 + 1.0f / 11;
  p = p * w2 + 1.0f / 9;
  p = p * w2 + 1.0f / 7;
  p = p * w2 + 1.0f / 5;
  p = p * w2 + 1.0f / 3;
  return 2.0f * (p * w2 * w + w);
}
#endif
FASTGEN_HD double expm1_(double x) { return expm1(x); }
FASTGEN_HD double log1p_(double x) { return log1p(x); }

// act(z); alpha: the slope of lrelu below 0
template <int kAct, typename T>
FASTGEN_HD T value(T z, T alpha) {
  if constexpr (kAct == kRelu) return z < T(0) ? T(0) : z;
  if constexpr (kAct == kLrelu) return z > T(0) ? z : z * alpha;
  if constexpr (kAct == kTanh) return tanh_(z);
  if constexpr (kAct == kSigmoid) return sigmoid_(z);
  if constexpr (kAct == kElu) return z > T(0) ? z : expm1_(z);
  if constexpr (kAct == kSelu) return T(kSeluScale) * (z > T(0) ? z : T(kSeluAlpha) * expm1_(z));
  if constexpr (kAct == kSoftplus) {
    const T a = z < T(0) ? -z : z;
    return z > T(kSoftplusLinear) ? z : (z > T(0) ? z : T(0)) + log1p_(exp_(-a));
  }
  if constexpr (kAct == kSwish) return z * sigmoid_(z);
  return z;
}

// act'(z)
template <int kAct, typename T>
FASTGEN_HD T first(T z, T alpha) {
  if constexpr (kAct == kRelu) return z > T(0) ? T(1) : T(0);
  if constexpr (kAct == kLrelu) return z > T(0) ? T(1) : alpha;
  if constexpr (kAct == kTanh) return act_grad<fastgen::kTanh>(z);
  if constexpr (kAct == kElu) return z > T(0) ? T(1) : exp_(z);
  if constexpr (kAct == kSelu) return T(kSeluScale) * (z > T(0) ? T(1) : T(kSeluAlpha) * exp_(z));
  if constexpr (kAct == kSigmoid) return act_grad<fastgen::kSigmoid>(z);
  if constexpr (kAct == kSoftplus) return z > T(kSoftplusLinear) ? T(1) : sigmoid_(z);
  if constexpr (kAct == kSwish) return act_grad<fastgen::kSilu>(z);
  return T(1);
}

// act''(z)
template <int kAct, typename T>
FASTGEN_HD T second(T z, T) {
  if constexpr (kAct == kTanh) return T(-2) * tanh_(z) * act_grad<fastgen::kTanh>(z);
  if constexpr (kAct == kElu) return z < T(0) ? exp_(z) : T(0);
  if constexpr (kAct == kSelu) return z < T(0) ? T(kSeluScale * kSeluAlpha) * exp_(z) : T(0);
  if constexpr (kAct == kSigmoid || kAct == kSoftplus || kAct == kSwish) {
    T s, rest;
    sigmoid_pair(z, s, rest);
    if constexpr (kAct == kSoftplus) return z > T(kSoftplusLinear) ? T(0) : s * rest;
    if constexpr (kAct == kSigmoid) return s * rest * (rest - s);
    return s * rest * (T(2) + z * (rest - s));
  }
  return T(0);
}

// clamp: infinity for none
template <int kAct, typename T>
FASTGEN_HD T g(T z, T alpha, T gain, T clamp) {
  const T v = gain * value<kAct>(z, alpha);
  return v > clamp ? clamp : v < -clamp ? -clamp : v;
}
// Whether clamp cuts gain act(z) off, so that both derivatives are 0. On the limit itself they are not, as in PyTorch.
template <int kAct, typename T>
FASTGEN_HD bool cut(T z, T alpha, T gain, T clamp) {
  const T v = gain * value<kAct>(z, alpha);
  return v > clamp || v < -clamp;
}
template <int kAct, typename T>
FASTGEN_HD T g_first(T z, T alpha, T gain, T clamp) {
  return cut<kAct>(z, alpha, gain, clamp) ? T(0) : gain * first<kAct>(z, alpha);
}
template <int kAct, typename T>
FASTGEN_HD T g_second(T z, T alpha, T gain, T clamp) {
  return cut<kAct>(z, alpha, gain, clamp) ? T(0) : gain * second<kAct>(z, alpha);
}

}  // namespace fastgen::bias_act
