// Where the kernels would read and write, for images too large to be made: a kernel of the tests' own.
#include "cuda/images.cuh"

namespace fastgen {
namespace {

template <typename T, int kWalk>
__global__ void places_kernel(const Images images, int64_t index, int64_t* out) {
  const Item<T, kWalk> item(images, index);
  const int64_t found[] = {item.image, item.first, item.count, item.kCount};
  for (int i = 0; i < 4; ++i) out[i] = found[i];
  for (int j = 0; j < item.kCount; ++j) out[4 + j] = item.at(j);
}

// The item `index` of images of size channels * positions: out [20] is image, first, count, kCount, places.
void places(int64_t walk, int64_t channels, int64_t positions, int64_t items, int64_t index, const Tensor& places) {
  const Images images{1 << 20, channels * positions, channels, positions, items, true};
  auto* to = out<int64_t>(places);
  switch (walk) {
    case kRows: return launch(places_kernel<__half, kRows>, 1, 1, 0, nullptr, images, index, to);
    case kTiles3: return launch(places_kernel<__half, kTiles3>, 1, 1, 0, nullptr, images, index, to);
    case kTiles4: return launch(places_kernel<float, kTiles4>, 1, 1, 0, nullptr, images, index, to);
    default: return launch(places_kernel<float, kScattered>, 1, 1, 0, nullptr, images, index, to);
  }
}

__global__ void quotient_kernel(int64_t a, int64_t b, int64_t* out) { *out = quotient(a, b); }
void quotients(int64_t a, int64_t b, const Tensor& result) {
  launch(quotient_kernel, 1, 1, 0, nullptr, a, b, out<int64_t>(result));
}

// A block in which a thread stays away from a barrier, a warp in which a lane stays away from a shuffle, a misaligned
// vector, sums that hang on the order of threads: what the stand-in must find.
__global__ void wrong_kernel(int64_t what, float* x) {
  if (what == 0 && threadIdx.x != 3) __syncthreads();
  if (what == 1 && threadIdx.x != 3) x[threadIdx.x] = warp_sum(1.0f);
  if (what == 2) *reinterpret_cast<Pack<float, 4>*>(x + 1) = Pack<float, 4>{};
  if (what == 3) x[0] = static_cast<float>(threadIdx.x);
  if (what == 4) x[threadIdx.x] = block_sum(static_cast<float>(threadIdx.x));
}
void wrong(int64_t what, const Tensor& x) { launch(wrong_kernel, 1, 64, 0, nullptr, what, out<float>(x)); }

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def("places(int walk, int channels, int positions, int items, int index, Tensor(a!) out) -> ()");
  m.def("quotients(int a, int b, Tensor(a!) out) -> ()");
  m.def("wrong(int what, Tensor(a!) x) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) {
  m.impl("places", TORCH_BOX(&fastgen::places));
  m.impl("quotients", TORCH_BOX(&fastgen::quotients));
  m.impl("wrong", TORCH_BOX(&fastgen::wrong));
}
