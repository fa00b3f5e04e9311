// How kernels that may draw noise walk over a batch of images in one dense layout: every thread takes a few elements
// whose noise comes from whole Philox counters, in an order that makes its accesses vectors where it can.
//
// Noise element e of an image counts row-major over (channels, positions). So the elements are those of a row where
// the image is contiguous (or no noise is drawn, and any order will do), and where channels are innermost
//   - a tile of a few positions by all channels, for 3 and 4 channels (and whole tiles): contiguous in memory;
//   - else a few positions of one channel, neighbouring threads taking neighbouring channels, one element at a time.
// Which it is depends on the image's size and layout alone, as do the sums of `reparameterize`: alignment and the
// batch decide how an element is read, and change no bit.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common.cuh"

namespace fastgen {

enum Walk : int { kRows, kTiles3, kTiles4, kScattered };

struct Images {
  int64_t count, size, channels, positions;  // size = channels * positions elements an image
  int64_t items;                             // per image
  bool vectors;                              // whether all tensors begin at multiples of 16 bytes
};

// The elements one thread has at a time: `count` of kCount, of one image. What lies beyond them loads as 0.
template <typename T, int kWalk>
struct Item {
  static constexpr int kChannels = kWalk == kTiles3 ? 3 : kWalk == kTiles4 ? 4 : 1;
  static constexpr int kPositions = kChannels > 1 || sizeof(T) > 2 ? 4 : 8;
  static constexpr int kCount = kChannels * kPositions;  // in 16 bytes an access, in half precision by 3 channels in 8
  using W = Wide<T>;

  const Images& all;
  int64_t image, first;  // first: its first noise element
  int64_t offset;        // where that lies; where the image begins, if items straddle channels
  int64_t channel = 0;   // of the first element, for kScattered
  int count = kCount;
  bool vectors = false;

  // Item `index` of all, or of one image
  __device__ __forceinline__ Item(const Images& images, int64_t index) : all(images) {
    image = quotient(index, all.items);
    place(index - image * all.items);
  }
  __device__ __forceinline__ Item(const Images& images, int64_t in_image, int64_t index) : all(images), image(in_image) {
    place(index);
  }

  // Where element j lies.
  __device__ __forceinline__ int64_t at(int j) const {
    if constexpr (kWalk != kScattered) return offset + j;
    if (whole()) return offset + j * all.channels;
    int64_t c = channel, position = first + j - c * all.positions;
    while (position >= all.positions) position -= all.positions, ++c;
    return offset + position * all.channels + c;
  }

  // p: a tensor of these images, of any dtype
  template <typename U>
  __device__ __forceinline__ void load(const U* p, W (&to)[kCount]) const {
    if (vectors)
      load_wide<kCount>(p + offset, to);
    else
      load_each([&](int64_t i) { return widen(p[i]); }, to);
  }

  // The same one by one: element i of the tensor is read(i).
  template <typename F>
  __device__ __forceinline__ void load_each(const F& read, W (&to)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = j < count ? static_cast<W>(read(at(j))) : W(0);
  }

  __device__ __forceinline__ void store(T* p, const W (&from)[kCount]) const {
    if (vectors) {
      store_narrow<kCount>(p + offset, from);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (j < count) p[at(j)] = narrow<T>(from[j]);
    }
  }

  // The noise of its elements: that of the image with this seed.
  __device__ __forceinline__ void normals(int64_t seed, int64_t step, Stream stream, W (&to)[kCount]) const {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const auto block = static_cast<uint32_t>((c * all.positions + first) / 4);
#pragma unroll
      for (int q = 0; q < kPositions / 4; ++q) {
        float four[4];
        normal4(static_cast<uint64_t>(seed), block + q, static_cast<uint32_t>(step), stream, four);
#pragma unroll
        for (int k = 0; k < 4; ++k) to[(4 * q + k) * kChannels + c] = four[k];
      }
    }
  }

 private:
  // Whether no item straddles two channels.
  __device__ __forceinline__ bool whole() const { return all.positions % kPositions == 0; }

  __device__ __forceinline__ void place(int64_t index) {
    const int64_t start = image * all.size;
    first = index * kPositions;
    if constexpr (kWalk == kScattered) {
      if (whole()) {
        const int64_t group = quotient(index, all.channels), position = group * kPositions;
        channel = index - group * all.channels;
        first = channel * all.positions + position;
        offset = start + position * all.channels + channel;
        return;
      }
      offset = start;
      channel = quotient(first, all.positions);
    } else {
      offset = start + first * kChannels;
      vectors = all.vectors && offset % kCount == 0;
    }
    if constexpr (kChannels == 1) {
      if (all.size - first < kCount) count = static_cast<int>(all.size - first), vectors = false;
    }
  }
};

// The images of x [N, *], taken in the order of memory; pointers: every tensor of x's layout that the kernel touches.
template <typename T>
Images rows_of(const Tensor& x, std::initializer_list<const void*> pointers) {
  const int64_t count = x.size(0), size = x.numel() / count, each = Item<T, kRows>::kCount;
  Images images{count, size, 1, size, (size + each - 1) / each, true};
  for (const void* p : pointers) images.vectors = images.vectors && aligned(p);
  return images;
}

// Calls f(std::integral_constant<int, walk>{}, images) for x [N, *]; `logical`: noise is drawn, so that an element's
// place in the image counts.
template <typename T, typename F>
void for_walk(const Tensor& x, bool logical, std::initializer_list<const void*> pointers, const F& f) {
  Images images = rows_of<T>(x, pointers);
  if (!logical || x.is_contiguous()) return f(std::integral_constant<int, kRows>{}, images);
  images.channels = x.size(1);
  images.positions = images.size / images.channels;
  const auto fitting = [&](auto walk) {
    using I = Item<T, walk()>;
    if (images.channels != I::kChannels || images.positions % I::kPositions != 0) return false;
    images.items = images.positions / I::kPositions;
    f(walk, images);
    return true;
  };
  if constexpr (!std::is_same_v<T, double>) {  // which is there for checks of gradients
    if (fitting(std::integral_constant<int, kTiles3>{}) || fitting(std::integral_constant<int, kTiles4>{})) return;
  }
  f(std::integral_constant<int, kScattered>{}, images);
}

inline const int64_t* device_scalars(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(on_gpu(t), name, " must be on the GPU, where the kernel reads it");
  return in<int64_t>(t);
}
inline const int64_t* device_scalars(const OptTensor& t, const char* name) {
  return t ? device_scalars(*t, name) : nullptr;
}

}  // namespace fastgen
