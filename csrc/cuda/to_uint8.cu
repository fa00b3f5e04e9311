// to_uint8: images in [-1, 1] to bytes, round(clamp(x) * 127.5 + 127.5), and from [N, C, H, W] to
// [N, H, W, C], in one pass; see fastgen/ops/to_uint8.py.
//
// Limit: memory, sizeof(T) + 1 bytes an element and next to no arithmetic. 64 MB of bf16 pixels: 96 MB moved, 20 us
// on an H200 (4.8 TB/s).
#include "common.cuh"

namespace fastgen {
namespace {

// Two roundings, as the reference has them: a fused multiply-add would differ on ties. NaN gives 0.
__device__ uint8_t quantise(float x) {
  const float y = fminf(fmaxf(x, -1.0f), 1.0f);  // NaN gives -1, hence 0
  return static_cast<uint8_t>(__float2uint_rn(__fadd_rn(__fmul_rn(y, 127.5f), 127.5f)));
}
__device__ uint8_t quantise(double x) {
  const double y = fmin(fmax(x, -1.0), 1.0);
  return static_cast<uint8_t>(__double2uint_rn(__dadd_rn(__dmul_rn(y, 127.5), 127.5)));
}

// Bytes in the order of x: channels_last input, or one channel. x [size], out [size]; whole packs of kCount, then
// the rest one by one.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    flat_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t size) {
  const int64_t packs = size / kCount;
  for (int64_t i = first_item(); i < packs; i += item_stride()) {
    Wide<T> in[kCount];
    load_wide<kCount>(x + i * kCount, in);
    Pack<uint8_t, kCount> bytes;
#pragma unroll
    for (int j = 0; j < kCount; ++j) bytes.v[j] = quantise(in[j]);
    reinterpret_cast<Pack<uint8_t, kCount>*>(out)[i] = bytes;
  }
  for (int64_t i = packs * kCount + first_item(); i < size; i += item_stride()) out[i] = quantise(widen(x[i]));
}

// Contiguous x [N, C, pixels] to out [N, pixels, C], for any C and alignment: a thread has one pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    pixels_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t images, int64_t pixels,
                  int64_t channels) {
  for (int64_t i = first_item(); i < images * pixels; i += item_stride()) {
    const int64_t n = quotient(i, pixels), p = i - n * pixels;
    for (int64_t c = 0; c < channels; ++c)
      out[i * channels + c] = quantise(widen(x[(n * channels + c) * pixels + p]));
  }
}

// The same for C = 3 and kCount, a multiple of 4, dividing pixels: a thread has kCount pixels of one image, so that
// it reads whole vectors of each plane and writes the 3 kCount bytes that follow each other.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, 1)
    rgb_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t images, int64_t pixels) {
  const int64_t per_image = pixels / kCount;
  for (int64_t i = first_item(); i < images * per_image; i += item_stride()) {
    const int64_t n = quotient(i, per_image), p = (i - n * per_image) * kCount;
    Pack<uint8_t, kCount> packs[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      Wide<T> plane[kCount];
      load_wide<kCount>(x + (n * 3 + c) * pixels + p, plane);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int at = j * 3 + c;
        packs[at / kCount].v[at % kCount] = quantise(plane[j]);
      }
    }
    auto* to = reinterpret_cast<Pack<uint8_t, kCount>*>(out + (n * pixels + p) * 3);
#pragma unroll
    for (int j = 0; j < 3; ++j) to[j] = packs[j];
  }
}

// The largest count of elements, 16 or 4, for which x and out and every row that begins at a multiple of `row`
// elements of x are aligned for load_wide and a pack of bytes; 1 where there is none.
template <typename T>
int vector_count(const T* x, const uint8_t* out, int64_t row) {
  for (const int count : {16, 4}) {
    const size_t bytes = std::min<size_t>(16, count * sizeof(T));
    if (aligned(x, bytes) && aligned(out, count) && row % count == 0) return count;
  }
  return 1;
}

template <typename T>
void run(const Tensor& x_t, const Tensor& bytes, bool same_order) {
  const T* x = in<T>(x_t);
  auto* to = out<uint8_t>(bytes);
  const int64_t n = x_t.size(0), channels = x_t.size(1), pixels = x_t.size(2) * x_t.size(3), size = x_t.numel();
  const Gpu gpu(x_t);
  const auto start = [&](auto* kernel, int64_t items, auto... args) {
    launch(kernel, blocks_for(items), kThreads, 0, gpu.stream, x, to, args...);
  };
  if (same_order || channels == 1) {
    switch (vector_count(x, to, 0)) {
      case 16: return start(flat_kernel<T, 16>, size / 16 + 1, size);
      case 4: return start(flat_kernel<T, 4>, size / 4 + 1, size);
      default: return start(flat_kernel<T, 1>, size, size);
    }
  }
  switch (channels == 3 ? vector_count(x, to, pixels) : 1) {
    case 16: return start(rgb_kernel<T, 16>, size / 48, n, pixels);
    case 4: return start(rgb_kernel<T, 4>, size / 12, n, pixels);
    default: return start(pixels_kernel<T>, n * pixels, n, pixels, channels);
  }
}

// Strides count only where a dimension has more than one element.
bool has_strides(const Tensor& x, const int64_t (&strides)[4]) {
  for (int64_t d = 0; d < 4; ++d) {
    if (x.size(d) > 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// x [N, C, H, W] contiguous or channels_last, fp64, fp32, fp16 or bf16; out [N, H, W, C] uint8, contiguous.
void to_uint8_fwd(const Tensor& x, const Tensor& out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 4, "to_uint8: x must be [N, C, H, W], not ", x.dim(), "-dimensional");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(on_gpu(x) && on_gpu(out) && x.get_device_index() == out.get_device_index(),
                  "to_uint8: x and out must be on the same CUDA device");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous() && out.dim() == 4 && out.size(0) == n &&
                      out.size(1) == h && out.size(2) == w && out.size(3) == c,
                  "to_uint8: out must be contiguous uint8 [", n, ", ", h, ", ", w, ", ", c, "]");
  const bool channels_last = has_strides(x, {h * w * c, 1, w * c, c});
  STD_TORCH_CHECK(channels_last || has_strides(x, {h * w * c, h * w, w, 1}),
                  "to_uint8: x must be contiguous or channels_last");
  if (n * c * h * w == 0) return;
  for_dtype(x, "to_uint8", [&](auto zero) { run<decltype(zero)>(x, out, channels_last); });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) { m.def("to_uint8_fwd(Tensor x, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("to_uint8_fwd", TORCH_BOX(&fastgen::to_uint8_fwd)); }
