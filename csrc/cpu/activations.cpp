// No noise here: a multiplication and an addition may become one fused instruction.
#pragma GCC optimize("fp-contract=fast")

#include "activations.h"

#include <algorithm>

#include "../common/activations.h"
#include "simd.h"

namespace fastgen {
namespace {

template <int kAct, bool kGrad, typename W>
FASTGEN_BODY void loop(W* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = kGrad ? act_grad<kAct>(z[i]) : act<kAct>(z[i]);
}

// exp in fp32, and SiLU, the activation of every U-Net, written out: exp is a long chain of dependent instructions, of
// which a CPU's scheduler holds too few to overlap iterations by itself. Hence kAtOnce vectors, step by step, side by
// side.
template <Isa kIsa>
struct Chain {
  using S = Simd<kIsa, float>;
  using Vec = typename S::Vec;
  static constexpr int kAtOnce = 4;
  static constexpr int64_t kStep = kAtOnce * S::kLanes;

  // Calls f(j) for each vector.
  template <typename F>
  FASTGEN_BODY void each(const F& f) {
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce; ++j) f(j);
  }
#define FASTGEN_EACH(...) each([&](int j) __attribute__((always_inline)) { __VA_ARGS__; })

  // exp(x) = p * scale, as in exp_ (csrc/common/activations.h).
  FASTGEN_BODY void exponential(const Vec (&x)[kAtOnce], Vec (&p)[kAtOnce], Vec (&scale)[kAtOnce]) {
    typedef uint32_t Bits __attribute__((vector_size(vector_bytes(kIsa))));
    constexpr float kShift = 12582912.0f + 127.0f;  // + 1.5 2^23 rounds to an integer, and the exponent has its bias
    Vec r[kAtOnce];
    FASTGEN_EACH(r[j] = x[j] > 88.8f ? Vec{} + 88.8f : x[j]);    // n = 128: the exponent bits of infinity
    FASTGEN_EACH(r[j] = r[j] < -88.0f ? Vec{} - 88.0f : r[j]);  // n = -127: those of 0
    FASTGEN_EACH(scale[j] = r[j] * 1.44269504088896341f + kShift);
    FASTGEN_EACH(p[j] = scale[j] - kShift);
    FASTGEN_EACH(r[j] = (r[j] - p[j] * 0.693359375f) - p[j] * -2.12194440e-4f);
    FASTGEN_EACH(p[j] = r[j] * 1.9875691500e-4f + 1.3981999507e-3f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 8.3334519073e-3f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 4.1665795894e-2f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 1.6666665459e-1f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 5.0000001201e-1f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 1.0f);
    FASTGEN_EACH(p[j] = p[j] * r[j] + 1.0f);
    FASTGEN_EACH(scale[j] = reinterpret_cast<Vec>(reinterpret_cast<Bits>(scale[j]) << 23));
  }

  template <int kWhat>
  FASTGEN_BODY void block(float* z) {
    Vec x[kAtOnce], r[kAtOnce], scale[kAtOnce], p[kAtOnce];
    FASTGEN_EACH(x[j] = S::load(z + j * S::kLanes));
    FASTGEN_EACH(r[j] = kWhat == kExp ? x[j] : -x[j]);
    exponential(r, p, scale);
    if constexpr (kWhat == kExp) {
      FASTGEN_EACH(r[j] = p[j] * scale[j]);
    } else if constexpr (kWhat == kSiluGrad) {
      FASTGEN_EACH(p[j] = p[j] * scale[j]);
      FASTGEN_EACH(r[j] = 1.0f / (1.0f + p[j]));
      FASTGEN_EACH(p[j] = x[j] > 0.0f ? p[j] * r[j] : 1.0f - r[j]);
      FASTGEN_EACH(r[j] = r[j] * (x[j] * p[j] + 1.0f));
    } else {
      FASTGEN_EACH(r[j] = x[j] / (p[j] * scale[j] + 1.0f));
    }
    FASTGEN_EACH(S::store(z + j * S::kLanes, r[j]));
  }
#undef FASTGEN_EACH

  enum { kExp, kSiluItself, kSiluGrad };
  template <int kWhat>
  FASTGEN_BODY void run(float* z, int64_t n) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) block<kWhat>(z + i);
    if (i == n) return;
    alignas(64) float rest[kStep] = {};
    std::copy(z + i, z + n, rest);
    block<kWhat>(rest);
    std::copy_n(rest, n - i, z + i);
  }
};

struct Exponential {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(W* z, int64_t n) {
    Chain<kIsa>::template run<Chain<kIsa>::kExp>(z, n);
  }
};

template <bool kGrad>
struct Activate {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(int code, W* z, int64_t n) {
    switch (code) {
      case kRelu: return loop<kRelu, kGrad>(z, n);
      case kLeakyRelu: return loop<kLeakyRelu, kGrad>(z, n);
      case kSilu:
        if constexpr (std::is_same_v<W, float>)
          return Chain<kIsa>::template run<kGrad ? Chain<kIsa>::kSiluGrad : Chain<kIsa>::kSiluItself>(z, n);
        return loop<kSilu, kGrad>(z, n);
      case kGelu: return loop<kGelu, kGrad>(z, n);
      case kGeluTanh: return loop<kGeluTanh, kGrad>(z, n);
      case kTanh: return loop<kTanh, kGrad>(z, n);
      case kSigmoid: return loop<kSigmoid, kGrad>(z, n);
      default: return loop<kNone, kGrad>(z, n);
    }
  }
};

}  // namespace

void exponential(float* z, int64_t n) { multiversion<Exponential>(z, n); }
void exponential(double* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = exp_(z[i]);
}
void activate(int code, float* z, int64_t n) {
  if (code != kNone) multiversion<Activate<false>>(code, z, n);
}
void activate(int code, double* z, int64_t n) {
  if (code != kNone) multiversion<Activate<false>>(code, z, n);
}
void activate_grad(int code, float* z, int64_t n) { multiversion<Activate<true>>(code, z, n); }
void activate_grad(int code, double* z, int64_t n) { multiversion<Activate<true>>(code, z, n); }

}  // namespace fastgen
