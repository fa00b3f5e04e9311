// to_uint8: images in [-1, 1] to bytes, channels last; see fastgen/ops/to_uint8.py.
#include <cmath>

#include "common.h"

namespace fastgen {
namespace {

// x: count elements with stride; out: the same pixels, out_stride apart
template <typename T>
FASTGEN_BODY void forward_body(const T* x, uint8_t* out, int64_t count, int64_t stride, int64_t out_stride) {
  using W = Wide<T>;
  for (int64_t i = 0; i < count; ++i) {
    const W v = static_cast<W>(x[i * stride]);
    const W low = v > W(-1) ? v : W(-1);
    const W bounded = low < W(1) ? low : W(1);
    // Adding 1.5 2^23 (2^52) rounds to the nearest integer, halves to even, and vectorises; a NaN becomes 0 above.
    constexpr W magic = sizeof(W) == 8 ? W(6755399441055744.0) : W(12582912.0);
    out[i * out_stride] = static_cast<uint8_t>(static_cast<int32_t>((bounded * W(127.5) + W(127.5) + magic) - magic));
  }
}

// The same for three planes of a contiguous image, plane apart: the bytes come between each other where they are bytes
// already, and so in vectors.
template <typename T>
FASTGEN_BODY void rgb_body(const T* x, uint8_t* __restrict out, int64_t count, int64_t plane) {
  alignas(64) uint8_t bytes[3][kSpan];
  for (int c = 0; c < 3; ++c) forward_body(x + c * plane, bytes[c], count, 1, 1);
  for (int64_t i = 0; i < count; ++i) {
    out[3 * i] = bytes[0][i];
    out[3 * i + 1] = bytes[1][i];
    out[3 * i + 2] = bytes[2][i];
  }
}

// x: [N, C, H, W], contiguous or channels last; bytes: uint8 [N, H, W, C] contiguous
void to_uint8_fwd(const Tensor& x, const Tensor& bytes) {
  for_dtype(x, "to_uint8", [&](auto zero) {
    using T = decltype(zero);
    const T* data = in<T>(x);
    uint8_t* result = out<uint8_t>(bytes);
    const int64_t c = x.size(1);
    if (!x.is_contiguous() || c == 1) {  // the bytes have the input's own order
      for_spans(flat(x), [&](const Span& s) {
        multiversion<forward_body<T>>(data + s.offset, result + s.offset, s.count, int64_t{1}, int64_t{1});
      });
      return;
    }
    const int64_t pixels = x.size(2) * x.size(3);
    if (c == 3) {
      for_spans(Rows{x.size(0), pixels, pixels, 0, 1}, [&](const Span& s) {
        const int64_t first = s.image * 3 * pixels;
        multiversion<rgb_body<T>>(data + first + s.first, result + first + 3 * s.first, s.count, pixels);
      });
      return;
    }
    const Rows planes{x.size(0), c * pixels, pixels, pixels, 1};
    for_spans(planes, [&](const Span& s) {
      const int64_t channel = s.first / pixels, pixel = s.first % pixels;
      uint8_t* first = result + s.image * c * pixels + pixel * c + channel;
      multiversion<forward_body<T>>(data + s.offset, first, s.count, int64_t{1}, c);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) { m.def("to_uint8_fwd(Tensor x, Tensor(a!) out) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("to_uint8_fwd", TORCH_BOX(&fastgen::to_uint8_fwd)); }
