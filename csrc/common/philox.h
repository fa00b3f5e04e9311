// Noise that belongs to the image: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers:
// as easy as 1, 2, 3") and Box-Muller, for host and device. The one source: fastgen/ops/philox.py
// (PyTorch) and kernels/_philox.py (Triton) follow it bit for bit.
//
// Key = the image's 64-bit seed; counter = (element index within the image / 4, step, stream, 0).
// The normals use only + x and sqrt, each rounded once, so that every backend gets the same bits:
// compile with -ffp-contract=off; on the device the intrinsics below forbid contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTGEN_HD __host__ __device__ __forceinline__
#else
#define FASTGEN_HD inline __attribute__((always_inline))
#endif

namespace fastgen {

// What a draw is for; each purpose has its own stream, so no two ever share bits.
enum Stream : uint32_t {
  kStreamInitial = 0,         // x_T, where sampling starts; step 0
  kStreamStep = 1,            // the noise of one sampling step; step = row of the coefficient table
  kStreamQSample = 2,         // the forward diffusion; step = t
  kStreamReparameterize = 3,  // the latent of a VAE; step 0
  kStreamLabel = 4,           // a class label that was not given; step 0
};

struct Philox4 {
  uint32_t v[4];
};

FASTGEN_HD Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c0 = n0;
    c1 = static_cast<uint32_t>(p1);
    c2 = n2;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

#ifdef __CUDA_ARCH__
FASTGEN_HD float add_rn(float a, float b) { return __fadd_rn(a, b); }
FASTGEN_HD float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FASTGEN_HD double add_rn(double a, double b) { return __dadd_rn(a, b); }
FASTGEN_HD double mul_rn(double a, double b) { return __dmul_rn(a, b); }
FASTGEN_HD float sqrt_rn(float a) { return __fsqrt_rn(a); }
FASTGEN_HD uint32_t float_bits(float a) { return __float_as_uint(a); }
FASTGEN_HD float bits_float(uint32_t a) { return __uint_as_float(a); }
#else
FASTGEN_HD float add_rn(float a, float b) { return a + b; }
FASTGEN_HD float mul_rn(float a, float b) { return a * b; }
FASTGEN_HD double add_rn(double a, double b) { return a + b; }
FASTGEN_HD double mul_rn(double a, double b) { return a * b; }
FASTGEN_HD float sqrt_rn(float a) { return std::sqrt(a); }
FASTGEN_HD uint32_t float_bits(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}
FASTGEN_HD float bits_float(uint32_t u) {
  float a;
  std::memcpy(&a, &u, 4);
  return a;
}
#endif

// sum + a b in two roundings
template <typename W>
FASTGEN_HD W add_product(W sum, W a, W b) {
  return add_rn(sum, mul_rn(a, b));
}

// ln(u) for u in [2^-24, 1]: u = m 2^e with m in [sqrt(1/2), sqrt(2)), then Cephes' polynomial in m - 1.
FASTGEN_HD float log_rn(float u) {
  const uint32_t shifted = float_bits(u) - 0x3F3504F3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = add_rn(bits_float((shifted & 0x7FFFFFu) + 0x3F3504F3u), -1.0f);
  const float z = mul_rn(f, f);
  float p = 7.0376836292e-2f;
  p = add_rn(mul_rn(p, f), -1.1514610310e-1f);
  p = add_rn(mul_rn(p, f), 1.1676998740e-1f);
  p = add_rn(mul_rn(p, f), -1.2420140846e-1f);
  p = add_rn(mul_rn(p, f), 1.4249322787e-1f);
  p = add_rn(mul_rn(p, f), -1.6668057665e-1f);
  p = add_rn(mul_rn(p, f), 2.0000714765e-1f);
  p = add_rn(mul_rn(p, f), -2.4999993993e-1f);
  p = add_rn(mul_rn(p, f), 3.3333331174e-1f);
  p = mul_rn(mul_rn(p, f), z);
  p = add_rn(p, mul_rn(e, -2.12194440e-4f));
  p = add_rn(p, mul_rn(z, -0.5f));
  return add_rn(add_rn(f, p), mul_rn(e, 0.693359375f));
}

// Two standard normals from two words: radius sqrt(-2 ln u1), u1 = ((a >> 8) + 1) 2^-24 in (0, 1],
// angle 2 pi (b >> 8) 2^-24. The angle is reduced to [-pi/4, pi/4] in integers, hence exactly.
FASTGEN_HD float squared_radius(uint32_t a) {
  const float u1 = mul_rn(static_cast<float>(static_cast<int32_t>(a >> 8) + 1), 5.9604644775390625e-8f);
  return mul_rn(log_rn(u1), -2.0f);
}
FASTGEN_HD void at_angle(float squared, uint32_t b, float& first, float& second) {
  const float radius = sqrt_rn(squared);
  // The top two bits of b + 2^29 are the quadrant; b's other bits but the lowest 8, with a sign, are the rest.
  const uint32_t quadrant = b + (1u << 29), odd = quadrant << 1;
  const float x = mul_rn(static_cast<float>(static_cast<int32_t>(b << 2) >> 10), 3.7450702829239286e-7f);  // pi/2 2^-22
  const float z = mul_rn(x, x);
  float s = add_rn(mul_rn(z, -1.9515295891e-4f), 8.3321608736e-3f);
  s = add_rn(mul_rn(s, z), -1.6666654611e-1f);
  s = add_rn(mul_rn(mul_rn(s, z), x), x);
  float c = add_rn(mul_rn(z, 2.443315711809948e-5f), -1.388731625493765e-3f);
  c = add_rn(mul_rn(c, z), 4.166664568298827e-2f);
  c = add_rn(add_rn(mul_rn(mul_rn(c, z), z), mul_rn(z, -0.5f)), 1.0f);
  const bool swapped = static_cast<int32_t>(odd) < 0;
  const float cos_abs = swapped ? s : c, sin_abs = swapped ? c : s;
  first = mul_rn(radius, bits_float(float_bits(cos_abs) ^ ((quadrant ^ odd) & 0x80000000u)));
  second = mul_rn(radius, bits_float(float_bits(sin_abs) ^ (quadrant & 0x80000000u)));
}

FASTGEN_HD void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  at_angle(squared_radius(a), b, first, second);
}

// The four normals of one counter: elements 4 block … 4 block + 3 of the image.
FASTGEN_HD void normal4(uint64_t seed, uint32_t block, uint32_t step, uint32_t stream, float out[4]) {
  const Philox4 r = philox4x32_10(block, step, stream, 0u, seed);
  box_muller(r.v[0], r.v[1], out[0], out[1]);
  box_muller(r.v[2], r.v[3], out[2], out[3]);
}

}  // namespace fastgen
