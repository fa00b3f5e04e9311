// to_uint8: images in [-1, 1] to bytes, round(clamp(x) * 127.5 + 127.5), and from [N, C, H, W] to
// [N, H, W, C], in one pass. Limit: memory bandwidth, one read of x and one write of the bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

// A few consecutive elements, read or written at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two roundings, as the reference has them: a fused multiply-add would differ on ties. NaN gives 0.
__device__ uint8_t quantise(float x) {
  const float y = fminf(fmaxf(x, -1.0f), 1.0f);  // NaN gives -1, hence 0
  return static_cast<uint8_t>(__float2uint_rn(__fadd_rn(__fmul_rn(y, 127.5f), 127.5f)));
}
__device__ uint8_t quantise(double x) {
  const double y = fmin(fmax(x, -1.0), 1.0);
  return static_cast<uint8_t>(__double2uint_rn(__dadd_rn(__dmul_rn(y, 127.5), 127.5)));
}

// Bytes in the order of x: channels_last input, or one channel. x [packs * kCount], out likewise.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    flat_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t packs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    const auto in = reinterpret_cast<const Pack<T, kCount>*>(x)[i];
    Pack<uint8_t, kCount> bytes;
#pragma unroll
    for (int j = 0; j < kCount; ++j) bytes.v[j] = quantise(widen(in.v[j]));
    reinterpret_cast<Pack<uint8_t, kCount>*>(out)[i] = bytes;
  }
}

// Contiguous x [N, C, pixels] to out [N, pixels, C]. A thread takes kCount pixels of one image, so that
// reads are whole vectors of a plane and writes are the C * kCount bytes that follow each other.
// kChannels = 0 is any C, known at run time, with kCount = 1.
template <typename T, int kChannels, int kCount>
__global__ void __launch_bounds__(kThreads)
    planar_kernel(const T* __restrict__ x, uint8_t* __restrict__ out, int64_t packs, int64_t packs_per_image,
                  int64_t pixels, int64_t channels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    const int64_t n = i / packs_per_image, p = (i - n * packs_per_image) * kCount;
    if constexpr (kChannels == 0) {
      const T* in = x + n * channels * pixels + p;
      uint8_t* to = out + (n * pixels + p) * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = quantise(widen(in[c * pixels]));
    } else {
      const T* in = x + n * kChannels * pixels + p;
      Pack<uint8_t, 4> bytes[kChannels * kCount / 4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const auto plane = *reinterpret_cast<const Pack<T, kCount>*>(in + c * pixels);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const int at = j * kChannels + c;
          bytes[at / 4].v[at % 4] = quantise(widen(plane.v[j]));
        }
      }
      auto* to = reinterpret_cast<Pack<uint8_t, 4>*>(out + (n * pixels + p) * kChannels);
#pragma unroll
      for (int j = 0; j < kChannels * kCount / 4; ++j) to[j] = bytes[j];
    }
  }
}

unsigned int blocks_for(int64_t items) {
  // The loops take any remainder; the cap keeps the grid within its limit of 2^31 - 1.
  return static_cast<unsigned int>(std::min<int64_t>((items + kThreads - 1) / kThreads, 1 << 20));
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T>
void launch(const void* x_data, uint8_t* out, int64_t n, int64_t channels, int64_t pixels, bool same_order,
            cudaStream_t stream) {
  constexpr int kCount = 4;
  const T* x = static_cast<const T*>(x_data);
  const int64_t total = n * channels * pixels;
  const bool vectors = aligned(x, sizeof(T) * kCount) && aligned(out, kCount);
  if (same_order) {
    if (vectors && total % kCount == 0) {
      flat_kernel<T, kCount><<<blocks_for(total / kCount), kThreads, 0, stream>>>(x, out, total / kCount);
    } else {
      flat_kernel<T, 1><<<blocks_for(total), kThreads, 0, stream>>>(x, out, total);
    }
  } else if (vectors && pixels % kCount == 0 && channels == 3) {
    const int64_t packs = n * pixels / kCount;
    planar_kernel<T, 3, kCount>
        <<<blocks_for(packs), kThreads, 0, stream>>>(x, out, packs, pixels / kCount, pixels, channels);
  } else {
    const int64_t packs = n * pixels;
    planar_kernel<T, 0, 1><<<blocks_for(packs), kThreads, 0, stream>>>(x, out, packs, pixels, pixels, channels);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Strides count only where a dimension has more than one element.
bool has_strides(const Tensor& x, const int64_t (&strides)[4]) {
  for (int64_t d = 0; d < 4; ++d) {
    if (x.size(d) > 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// x [N, C, H, W] contiguous or channels_last, fp64, fp32, fp16 or bf16; out [N, H, W, C] uint8, contiguous.
void to_uint8_fwd(const Tensor& x, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4, "to_uint8: x must be [N, C, H, W], not ", x.dim(), "-dimensional");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(x.is_cuda() && out.is_cuda() && x.get_device_index() == out.get_device_index(),
                  "to_uint8: x and out must be on the same CUDA device");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous() && out.dim() == 4 && out.size(0) == n &&
                      out.size(1) == h && out.size(2) == w && out.size(3) == c,
                  "to_uint8: out must be contiguous uint8 [", n, ", ", h, ", ", w, ", ", c, "]");
  const bool channels_last = has_strides(x, {h * w * c, 1, w * c, c});
  STD_TORCH_CHECK(channels_last || has_strides(x, {h * w * c, h * w, w, 1}),
                  "to_uint8: x must be contiguous or channels_last");
  if (n * c * h * w == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
  const auto stream = static_cast<cudaStream_t>(handle);
  const void* in = x.const_data_ptr();
  auto* bytes = static_cast<uint8_t*>(out.mutable_data_ptr());
  switch (x.scalar_type()) {
    case ScalarType::Double: return launch<double>(in, bytes, n, c, h * w, channels_last, stream);
    case ScalarType::Float: return launch<float>(in, bytes, n, c, h * w, channels_last, stream);
    case ScalarType::Half: return launch<__half>(in, bytes, n, c, h * w, channels_last, stream);
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(in, bytes, n, c, h * w, channels_last, stream);
    default: STD_TORCH_CHECK(false, "to_uint8: x must be fp64, fp32, fp16 or bf16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) { m.def("to_uint8_fwd(Tensor x, Tensor(a!) out) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("to_uint8_fwd", TORCH_BOX(&to_uint8_fwd)); }
