// Philox-4x32-10 and Box-Muller, vectorised; see noise.h.
#include "noise.h"

#include "isa.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are not passed: everything here is inlined

namespace fastgen {
namespace {

// AVX-512 too takes 32 bytes.
template <Isa kIsa>
struct Vectors {
  static constexpr int kBytes = kIsa == Isa::generic ? 16 : 32;
  typedef uint64_t U64 __attribute__((vector_size(kBytes)));
  typedef uint32_t U32 __attribute__((vector_size(kBytes)));
  typedef int32_t I32 __attribute__((vector_size(kBytes)));
  typedef float F32 __attribute__((vector_size(kBytes)));

  // product = the lower half of a times b: one instruction, which GCC does not find in the general form.
  FASTGEN_BODY void multiply(const U64& a, uint32_t b, U64& product) {
#if FASTGEN_X86_64 && !defined(__clang__)
    typedef int Halves16 __attribute__((vector_size(16)));
    typedef int Halves32 __attribute__((vector_size(32)));
    if constexpr (kBytes == 32)
      product = (U64)__builtin_ia32_pmuludq256((Halves32)a, (Halves32)(U64{} + b));
    else
      product = (U64)__builtin_ia32_pmuludq128((Halves16)a, (Halves16)(U64{} + b));
#else
    product = (a & 0xFFFFFFFFu) * b;
#endif
  }
};

// The four words of the counters (first + i, step, stream, 0), i < kNoiseLanes: philox4x32_10, whose first two
// rounds are shortened, since only the first word of the counter varies. A word is the lower half of 64 bits, and
// what the multiplication leaves in the upper half does no harm.
template <Isa kIsa>
FASTGEN_BODY void fill_words(uint64_t seed, uint32_t step, uint32_t stream, uint32_t first,
                             uint32_t (&words)[4][kNoiseLanes]) {
  using V = typename Vectors<kIsa>::U64;
  constexpr int kLanes = Vectors<kIsa>::kBytes / 8;
  constexpr int kWays = 4;  // vectors at once: each round waits for the one before
  constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t p1 = static_cast<uint64_t>(kM1) * stream;
  const uint64_t p0 = static_cast<uint64_t>(kM0) * (static_cast<uint32_t>(p1 >> 32) ^ step ^ k0);
  const uint32_t x0 = static_cast<uint32_t>(p1) ^ (k0 + kW0), x2 = static_cast<uint32_t>(p0 >> 32) ^ (k1 + kW1);
  V even{};
  for (int l = 0; l < kLanes; ++l) even[l] = static_cast<uint64_t>(2 * l);
  for (int i = 0; i < kNoiseLanes; i += kWays * kLanes) {
    V c[kWays][4] = {};  // counters of even and of odd number in turn
    for (int w = 0; w < kWays; ++w) {
      const uint32_t start = first + static_cast<uint32_t>(i + w / 2 * 2 * kLanes + w % 2);
      V low, high;
      Vectors<kIsa>::multiply(even + start, kM0, low);
      Vectors<kIsa>::multiply((low >> 32) ^ k1, kM1, high);
      c[w][0] = (high >> 32) ^ x0;
      c[w][1] = high;
      c[w][2] = low ^ x2;
      c[w][3] = V{} + static_cast<uint32_t>(p0);
    }
#pragma GCC unroll 8
    for (uint32_t round = 2; round < 10; ++round)
      for (int w = 0; w < kWays; ++w) {
        V low, high;
        Vectors<kIsa>::multiply(c[w][0], kM0, low);
        Vectors<kIsa>::multiply(c[w][2], kM1, high);
        c[w][0] = (high >> 32) ^ c[w][1] ^ (k0 + round * kW0);
        c[w][1] = high;
        c[w][2] = (low >> 32) ^ c[w][3] ^ (k1 + round * kW1);
        c[w][3] = low;
      }
    for (int w = 0; w < kWays; w += 2)
      for (int k = 0; k < 4; ++k) {
        const V both = (c[w][k] & 0xFFFFFFFFu) | (c[w + 1][k] << 32);
        std::memcpy(&words[k][i + w * kLanes], &both, sizeof both);
      }
  }
}

// squared_radius for kNoiseLanes words, eight vectors side by side, step by step, since each step waits for the one
// before. Left to itself GCC lines up the steps of one vector, and no CPU looks ahead far enough to find the others.
template <Isa kIsa>
FASTGEN_BODY void fill_squares(const uint32_t (&words)[kNoiseLanes], float (&squares)[kNoiseLanes]) {
  using U32 = typename Vectors<kIsa>::U32;
  using I32 = typename Vectors<kIsa>::I32;
  using F32 = typename Vectors<kIsa>::F32;
  constexpr int kLanes = Vectors<kIsa>::kBytes / 4, kWays = 8;
  constexpr float kLog[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                            -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  for (int i = 0; i < kNoiseLanes; i += kWays * kLanes) {
    U32 shifted[kWays] = {};
    F32 f[kWays], p[kWays];
    for (int w = 0; w < kWays; ++w) {
      U32 a;
      std::memcpy(&a, &words[i + w * kLanes], sizeof a);
      const F32 u1 = __builtin_convertvector((I32)(a >> 8) + 1, F32) * 5.9604644775390625e-8f;
      shifted[w] = (U32)u1 - 0x3F3504F3u;
      f[w] = (F32)((shifted[w] & 0x7FFFFFu) + 0x3F3504F3u) + -1.0f;
      p[w] = F32{} + 7.0376836292e-2f;
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
      for (int w = 0; w < kWays; ++w) {
        p[w] = p[w] * f[w] + kLog[k];
#if FASTGEN_X86_64
        asm("" : "+v"(p[w]));  // does nothing, here and now
#endif
      }
    for (int w = 0; w < kWays; ++w) {
      const F32 e = __builtin_convertvector((I32)shifted[w] >> 23, F32), z = f[w] * f[w];
      p[w] = p[w] * f[w] * z;
      p[w] = p[w] + e * -2.12194440e-4f;
      p[w] = p[w] + z * -0.5f;
      p[w] = ((f[w] + p[w]) + e * 0.693359375f) * -2.0f;
      std::memcpy(&squares[i + w * kLanes], &p[w], sizeof p[w]);
    }
  }
}

struct Normals {
  template <Isa kIsa>
  FASTGEN_BODY void run(uint64_t seed, uint32_t step, uint32_t stream, uint32_t block, int64_t blocks, float* out) {
    alignas(64) uint32_t words[4][kNoiseLanes];
    alignas(64) float lanes[4][kNoiseLanes];
    alignas(64) float squares[kNoiseLanes];
    for (int64_t b = 0; b < blocks; b += kNoiseLanes, out += 4 * kNoiseLanes) {
      fill_words<kIsa>(seed, step, stream, block + static_cast<uint32_t>(b), words);
      for (int k = 0; k < 4; k += 2) {
        fill_squares<kIsa>(words[k], squares);
        for (int i = 0; i < kNoiseLanes; ++i) at_angle(squares[i], words[k + 1][i], lanes[k][i], lanes[k + 1][i]);
      }
      const int n = static_cast<int>(blocks - b < kNoiseLanes ? blocks - b : kNoiseLanes);
      for (int i = 0; i < n; ++i)
        for (int k = 0; k < 4; ++k) out[4 * i + k] = lanes[k][i];
    }
  }
};

}  // namespace

const float* fill_normals(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t count,
                          NoiseBuffer& buffer) {
  const int64_t skipped = first % 4;
  multiversion<Normals>(seed, step, stream, static_cast<uint32_t>(first / 4), (skipped + count + 3) / 4,
                        static_cast<float*>(buffer.v));
  return buffer.v + skipped;
}

}  // namespace fastgen
