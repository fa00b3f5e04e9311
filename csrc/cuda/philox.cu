// philox_normal, philox_bits: the noise of images, see csrc/common/philox.h.
//
// Limit of philox_normal: the issue slots. Some 40 instructions an element: 16 M elements take 30 us on an H200, whose
// memory takes the 64 MB of fp32 in 14 us (4.8 TB/s).
#include "images.cuh"

namespace fastgen {
namespace {

// seeds [N] -> out [N, *], contiguous
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    philox_normal_fwd_kernel(const Images images, const int64_t* seeds, int64_t step, Stream stream, T* out) {
  using I = Item<T, kRows>;
  for (int64_t i = first_item(); i < images.count * images.items; i += item_stride()) {
    const I item(images, i);
    Wide<T> z[I::kCount];
    item.normals(seeds[item.image], step, stream, z);
    item.store(out, z);
  }
}

// seeds [N] -> words [N, size]; a thread has the words of one counter
__global__ void __launch_bounds__(kThreads, 1)
    philox_bits_fwd_kernel(const Images images, const int64_t* seeds, int64_t step, int64_t stream, int64_t* words) {
  for (int64_t i = first_item(); i < images.count * images.items; i += item_stride()) {
    const Item<float, kRows> item(images, i);
    const Philox4 made = philox4x32_10(static_cast<uint32_t>(item.first / 4), static_cast<uint32_t>(step),
                                       static_cast<uint32_t>(stream), 0u, static_cast<uint64_t>(seeds[item.image]));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < item.count) words[item.offset + j] = made.v[j];
  }
}

void philox_normal_fwd(const Tensor& seeds, int64_t step, int64_t stream, const Tensor& z) {
  if (z.numel() == 0) return;
  const Gpu gpu(z);
  for_dtype(z, "philox_normal", [&](auto zero) {
    using T = decltype(zero);
    const Images images = rows_of<T>(z, {z.const_data_ptr()});
    launch(philox_normal_fwd_kernel<T>, blocks_for(images.count * images.items), kThreads, 0, gpu.stream, images,
           device_scalars(seeds, "seeds"), step, static_cast<Stream>(stream), out<T>(z));
  });
}

void philox_bits_fwd(const Tensor& seeds, int64_t step, int64_t stream, const Tensor& words) {
  if (words.numel() == 0) return;
  const Gpu gpu(words);
  const Images images = rows_of<float>(words, {});
  launch(philox_bits_fwd_kernel, blocks_for(images.count * images.items), kThreads, 0, gpu.stream, images,
         device_scalars(seeds, "seeds"), step, stream, out<int64_t>(words));
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def("philox_normal_fwd(Tensor seeds, int step, int stream, Tensor(a!) out) -> ()");
  m.def("philox_bits_fwd(Tensor seeds, int step, int stream, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) {
  m.impl("philox_normal_fwd", TORCH_BOX(&fastgen::philox_normal_fwd));
  m.impl("philox_bits_fwd", TORCH_BOX(&fastgen::philox_bits_fwd));
}
