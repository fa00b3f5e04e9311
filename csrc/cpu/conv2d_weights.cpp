// The weights of conv2d in the order and form in which its kernels read them, and a checksum that tells when weights
// have changed.
#pragma GCC optimize("fp-contract=fast")

#include "conv2d.h"

namespace fastgen {
namespace {

// Where element (phase, k, c, r, s) of the weights lies: base + k * sk + c * sc + r * sr + s * ss.
struct Source {
  int64_t k, c, taps_h, taps_w, phases, sk, sc, sr, ss;
  int64_t base[4];
};

// Panels [begin, end) of weights, transformed, in the order in which Multiply reads them: [phases, groups, F, panels of
// the group, C, kPanel]; Direct: [.., 1, panels, taps * C, kPanel].
struct Pack {
  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY void run(F, const Source* source, const W* weight, W* packed, int64_t begin, int64_t end) {
    using S = Simd<kIsa, W>;
    using Vec = typename S::Vec;
    constexpr int64_t kN = kPanel<kIsa, W>, kPanels = kGroup / kN;
    constexpr int kIn = F::kIn, kTaps = F::kTaps;
    const Source& s = *source;
    const int64_t panels = (s.k + kN - 1) / kN, taps = s.taps_h * s.taps_w;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k0 = i % panels * kN, kn = std::min(kN, s.k - k0);
      const W* from = weight + s.base[i / panels] + k0 * s.sk;
      const int64_t group = i % panels / kPanels, here = std::min(kPanels, panels - group * kPanels);
      const int64_t depth = (kTaps > 0 ? 1 : taps) * s.c, apart = here * depth * kN;  // from one number to the next
      W* to = packed + ((i - i % panels + group * kPanels) * kNumbers<F> + i % panels % kPanels) * depth * kN;
      for (int64_t c = 0; c < s.c; ++c) {
        if constexpr (kTaps > 0) {
          alignas(64) W g[kTaps * kTaps][kN] = {};
          for (int64_t k = 0; k < kn; ++k)
            for (int r = 0; r < kTaps; ++r)
              for (int q = 0; q < kTaps; ++q) g[r * kTaps + q][k] = from[k * s.sk + c * s.sc + r * s.sr + q * s.ss];
          for (int64_t e = 0; e < kN; e += S::kLanes) {
            Vec part[kTaps][kIn];
            for (int q = 0; q < kTaps; ++q) {
              Vec column[kTaps];
              for (int r = 0; r < kTaps; ++r) column[r] = S::load(&g[r * kTaps + q][e]);
              F::filter(column, part[q], W(0));
            }
            for (int r = 0; r < kIn; ++r) {
              Vec row[kTaps], u[kIn];
              for (int q = 0; q < kTaps; ++q) row[q] = part[q][r];
              F::filter(row, u, W(0));
              for (int q = 0; q < kIn; ++q) S::store(to + (r * kIn + q) * apart + c * kN + e, u[q]);
            }
          }
        } else {
          for (int64_t t = 0; t < taps; ++t) {
            const W* at = from + c * s.sc + t / s.taps_w * s.sr + t % s.taps_w * s.ss;
            for (int64_t k = 0; k < kN; ++k) to[(t * s.c + c) * kN + k] = k < kn ? at[k * s.sk] : W(0);
          }
        }
      }
    }
  }
};

// How a weight tensor is read. 0: conv2d's [K, C, kh, kw]. 1: the data gradient's, channels exchanged, taps reversed.
// 2: the sub-pixels of a transposed convolution [C, K, 4, 4] of stride 2 and padding 1: output 2 i + a takes the 2 taps
// 3 - a and 1 - a of the input rows i - 1 + a and i + a.
Source source_of(const Tensor& weight, int64_t way) {
  const int64_t s0 = weight.stride(0), s1 = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
  const int64_t kh = weight.size(2), kw = weight.size(3);
  if (way == 0) return {weight.size(0), weight.size(1), kh, kw, 1, s0, s1, sr, ss, {0}};
  if (way == 1)
    return {weight.size(1), weight.size(0), kh, kw, 1, s1, s0, -sr, -ss, {(kh - 1) * sr + (kw - 1) * ss}};
  Source s{weight.size(1), weight.size(0), 2, 2, 4, s1, s0, -2 * sr, -2 * ss, {}};
  for (int64_t phase = 0; phase < 4; ++phase) s.base[phase] = (3 - phase / 2) * sr + (3 - phase % 2) * ss;
  return s;
}

// The number of elements that conv2d_pack fills.
int64_t conv2d_packed_size(const Tensor& weight, int64_t way, int64_t algorithm) {
  const Source s = source_of(weight, way);
  int64_t size = 0;
  for_dtype(weight, "conv2d_packed_size", [&](auto zero) {
    const int64_t panel = 2 * lanes<Wide<decltype(zero)>>();
    const int64_t numbers = for_algorithm(algorithm, [&](auto f) {
      using F = decltype(f);
      return F::kTaps > 0 ? kNumbers<F> : s.taps_h * s.taps_w;
    });
    size = s.phases * round_up(s.k, panel) * numbers * s.c;
  });
  return size;
}

// weight: four dimensions, any strides, fp32 or fp64; packed: conv2d_packed_size elements
void conv2d_pack(const Tensor& weight, int64_t way, int64_t algorithm, const Tensor& packed) {
  const Source s = source_of(weight, way);
  const auto fill = [&](auto zero) {
    using W = decltype(zero);
    const int64_t panel = 2 * lanes<W>(), panels = s.phases * ((s.k + panel - 1) / panel);
    huge_pages(packed.mutable_data_ptr(), packed.numel() * static_cast<int64_t>(sizeof(W)));
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for_algorithm(algorithm, [&](auto f) {
        multiversion<Pack>(f, &s, in<W>(weight), out<W>(packed), begin, end);
      });
    });
  };
  if (weight.scalar_type() == ScalarType::Double) return fill(double{});
  fill(float{});
}

using Word = uint64_t __attribute__((aligned(1), may_alias));  // weights may lie anywhere
constexpr int kLanes = 8;

// Eight lanes, each the sum of products of the two halves of a word, masked by a key that differs from word to word,
// and of its neighbour's words, as in XXH3's accumulation (Collet 2019). A product can hide a change, where one half is
// 0; the neighbour's sum then shows it.
FASTGEN_BODY void accumulate(const Word* words, int64_t n, uint64_t* sums) {
  uint64_t sum[kLanes], key[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    sum[i] = 0x9E3779B185EBCA87u * (i + 1);
    key[i] = 0xC2B2AE3D27D4EB4Fu * (2 * i + 1);
  }
  for (int64_t at = 0; at < n; at += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t masked = words[at + i] ^ key[i];
      sum[i] += (masked & 0xFFFFFFFFu) * (masked >> 32) + words[at + (i ^ 1)];
      key[i] += 0x165667B19E3779F9u;
    }
  for (int i = 0; i < kLanes; ++i) sums[i] = sum[i];
}

// 64 bits that change with any bit of n words, a multiple of 8, and with their order. The lanes are mixed out here: in
// the body, GCC 12 vectorises the loop for AVX2 into one that gives something else.
uint64_t checksum(const void* words, int64_t n) {
  uint64_t sums[kLanes], all = static_cast<uint64_t>(n);
  multiversion<accumulate>(static_cast<const Word*>(words), n, sums);
  for (const uint64_t sum : sums) {
    all = (all ^ sum) * 0x9FB21C651E98DF25u;
    all ^= all >> 35;
  }
  return all;
}

// The checksum of a tensor's bytes in memory order; it must be dense. Pieces of a fixed size, so that it does not
// depend on the number of threads.
int64_t conv2d_checksum(const Tensor& weight) {
  constexpr int64_t kPiece = 32 << 10, kBytes = 64;
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t bytes = weight.numel() * static_cast<int64_t>(weight.element_size());
  const int64_t whole = bytes / kBytes * kBytes, pieces = (whole + kPiece - 1) / kPiece;
  std::vector<uint64_t> sums(pieces + 8, 0);
  torch::stable::parallel_for(0, pieces, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[i] = checksum(data + i * kPiece, std::min(kPiece, whole - i * kPiece) / 8);
  });
  std::memcpy(sums.data() + pieces, data + whole, bytes - whole);
  sums.resize(round_up(pieces + 8, 8));
  return static_cast<int64_t>(checksum(sums.data(), static_cast<int64_t>(sums.size())));
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def("conv2d_packed_size(Tensor weight, int way, int algorithm) -> int");
  m.def("conv2d_pack(Tensor weight, int way, int algorithm, Tensor(a!) packed) -> ()");
  m.def("conv2d_checksum(Tensor weight) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("conv2d_packed_size", TORCH_BOX(&fastgen::conv2d_packed_size));
  m.impl("conv2d_pack", TORCH_BOX(&fastgen::conv2d_pack));
  m.impl("conv2d_checksum", TORCH_BOX(&fastgen::conv2d_checksum));
}
