// philox_normal, philox_bits: the noise of images, see csrc/common/philox.h.
#include "common.h"
#include "noise.h"

namespace fastgen {
namespace {

static_assert(kSpan <= kNoiseSpan);

template <typename T>
FASTGEN_BODY void store_body(const float* values, int64_t count, T* out) {
  scatter(values, count, 1, out);
}

// seeds: int64 [N]; out: [N, *] contiguous
void philox_normal_fwd(const Tensor& seeds, int64_t step, int64_t stream, const Tensor& z) {
  const int64_t* seed = in<int64_t>(seeds);
  for_dtype(z, "philox_normal", [&](auto zero) {
    using T = decltype(zero);
    T* data = out<T>(z);
    for_spans(flat(z), [&](const Span& s) {
      NoiseBuffer buffer;
      const float* values = fill_normals(static_cast<uint64_t>(seed[s.image]), static_cast<uint32_t>(step),
                                         static_cast<uint32_t>(stream), s.first, s.count, buffer);
      multiversion<store_body<T>>(values, s.count, data + s.offset);
    });
  });
}

// seeds: int64 [N]; words: int64 [N, n] contiguous
void philox_bits_fwd(const Tensor& seeds, int64_t step, int64_t stream, const Tensor& words) {
  const int64_t* seed = in<int64_t>(seeds);
  int64_t* data = out<int64_t>(words);
  for_spans(flat(words), [&](const Span& s) {
    for (int64_t i = 0; i < s.count; ++i) {
      const int64_t e = s.first + i;
      data[s.offset + i] = philox4x32_10(static_cast<uint32_t>(e / 4), static_cast<uint32_t>(step),
                                         static_cast<uint32_t>(stream), 0u, static_cast<uint64_t>(seed[s.image]))
                               .v[e % 4];
    }
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def("philox_normal_fwd(Tensor seeds, int step, int stream, Tensor(a!) out) -> ()");
  m.def("philox_bits_fwd(Tensor seeds, int step, int stream, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("philox_normal_fwd", TORCH_BOX(&fastgen::philox_normal_fwd));
  m.impl("philox_bits_fwd", TORCH_BOX(&fastgen::philox_bits_fwd));
}
