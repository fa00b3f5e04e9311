// upfirdn2d: y[o] = gain sum_k f[k] p[o down + k], p the padded image with zeros between its pixels; see
// fastgen/ops/upfirdn2d.py. Its derivatives, of every order, are itself with other numbers.
//
// Contiguous images, scaled by 1 or 2: a block takes a tile of one plane's outputs (of several small planes), reads the
// pixels under it once into shared memory and visits only the taps that meet a pixel; a separable filter makes its two
// passes there. Channels last, and all else: a thread an output pixel, with 16 bytes of channels, and the caches see
// to pixels that many outputs share; a separable filter takes two launches with fp32 (fp64) in between.
//
// Least traffic: x and y once. On an H200 (4.8 TB/s) 64 MiB of bf16 that grow to 256 take 70 µs, and as long the other
// way. With 4 x 4 taps an output takes 4 multiplications up and 16 down (0.5 GFLOP either way: 10 µs); reading shared
// memory, 1.25 words a tap at 32 a cycle, takes some 90 µs and is the limit of the tiles.
#include <torch/csrc/stable/ops.h>

#include "cuda/cluster.cuh"
#include "cuda/common.cuh"

namespace fastgen {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // outputs of a thread, one below the other, which share their taps
constexpr int kTileShared = 48 * 1024;

struct Axis {
  int up, down, pad, taps;
  int size, out;  // of the image and of the result
};

struct Sampling {
  Axis x, y;
  int64_t images, channels;
  bool flip, last;  // flip: f as it is; last: channels last
};

// For an output, the first tap that meets a pixel, and that pixel.
__device__ __forceinline__ void first_tap(const Axis& a, int output, int& tap, int& pixel) {
  const int start = output * a.down - a.pad;
  int rest = start % a.up;
  if (rest < 0) rest += a.up;
  tap = rest == 0 ? 0 : a.up - rest;
  pixel = (start + tap) / a.up;  // without a remainder
}

// value / by, and the remainder in value
__device__ __forceinline__ int64_t split(int64_t& value, int64_t by) {
  const int64_t whole = quotient(value, by);
  value -= whole * by;
  return whole;
}

// kWide channels of one output pixel a thread, in the order of memory.
template <typename T, typename R, int kWide, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    upfirdn2d_direct_kernel(const T* x,  // [N, C, H, W]
                            const W* f,  // [taps y, taps x]
                            R* y,        // [N, C, H', W']
                            Sampling s, W gain, int64_t items) {
  const int64_t apart = s.last ? s.channels : 1;  // from one pixel to the next
  for (int64_t i = first_item(); i < items; i += item_stride()) {
    int64_t channel = 0, column = i, row, plane;
    if (s.last) {
      channel = i;
      column = split(channel, s.channels / kWide);
      channel *= kWide;
    }
    row = split(column, s.x.out);
    plane = split(row, s.y.out);
    int tap_x, tap_y, ix, iy;
    first_tap(s.x, static_cast<int>(column), tap_x, ix);
    first_tap(s.y, static_cast<int>(row), tap_y, iy);
    const T* from = x + plane * s.x.size * s.y.size * apart + channel;
    W sum[kWide] = {};
    for (int ky = tap_y; ky < s.y.taps; ky += s.y.up, ++iy) {
      if (iy < 0 || iy >= s.y.size) continue;
      int px = ix;
      for (int kx = tap_x; kx < s.x.taps; kx += s.x.up, ++px) {
        if (px < 0 || px >= s.x.size) continue;
        const int k = ky * s.x.taps + kx;
        const W factor = f[s.flip ? k : s.y.taps * s.x.taps - 1 - k];
        W value[kWide];
        load_wide(from + (static_cast<int64_t>(iy) * s.x.size + px) * apart, value);
#pragma unroll
        for (int j = 0; j < kWide; ++j) sum[j] += factor * value[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) sum[j] *= gain;
    store_narrow(y + i * kWide, sum);
  }
}

// How the tiles lie: 2^log_w x 2^log_h outputs of so many planes, of in_w x in_h pixels each.
struct Tiling {
  int log_w, log_h, planes;
  int in_w, in_h;
  int across, down;  // tiles of a plane
  int64_t all_planes;
};

// One tile. Shared memory, of W: the filter, [planes, in_h, in_w] pixels and, where the filter is separable, [planes,
// in_h, tile width] sums of rows.
template <typename T, int kUp, int kDown, bool kSeparable, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    upfirdn2d_tile_kernel(const T* x,  // [N, C, H, W]
                          const W* f,  // [taps y, taps x], or [taps] of a separable filter
                          T* y,        // [N, C, H', W']
                          Sampling s, Tiling t, W gain) {
  const int thread = static_cast<int>(threadIdx.x), taps = kSeparable ? s.x.taps : s.x.taps * s.y.taps;
  W* filter = dynamic_shared<W>();
  W* pixels = filter + taps;
  W* sums = pixels + t.planes * t.in_h * t.in_w;
  const int tiles = t.across * t.down, tile = static_cast<int>(blockIdx.x) % tiles;
  const int64_t first_plane = static_cast<int64_t>(blockIdx.x / tiles) * t.planes;
  const int left = tile % t.across << t.log_w, top = tile / t.across << t.log_h;
  // The tile's first pixels: scales are powers of two, so that remainders and quotients round downwards.
  const auto tap_of = [](const Axis& a, int output) { return (a.pad - output * kDown) & (kUp - 1); };
  const auto pixel_of = [&](const Axis& a, int output) {
    return (output * kDown - a.pad + tap_of(a, output)) >> (kUp / 2);
  };
  const int first_x = pixel_of(s.x, left), first_y = pixel_of(s.y, top);
  for (int k = thread; k < taps; k += kThreads) filter[k] = f[s.flip ? k : taps - 1 - k];
  for (int row = thread / 32; row < t.planes * t.in_h; row += kWarps) {
    const int p = row / t.in_h, iy = first_y + row - p * t.in_h;
    const bool there = first_plane + p < t.all_planes && iy >= 0 && iy < s.y.size;
    const T* from = x + ((first_plane + p) * s.y.size + iy) * s.x.size;
    for (int c = thread % 32; c < t.in_w; c += 32) {
      const int ix = first_x + c;
      pixels[row * t.in_w + c] = there && ix >= 0 && ix < s.x.size ? static_cast<W>(widen(from[ix])) : W(0);
    }
  }
  __syncthreads();
  const int width = 1 << t.log_w, height = 1 << t.log_h;
  if constexpr (kSeparable) {
    for (int i = thread; i < t.planes * t.in_h * width; i += kThreads) {
      const int ox = left + (i & (width - 1));
      const W* from = pixels + (i >> t.log_w) * t.in_w + pixel_of(s.x, ox) - first_x;
      W sum = 0;
      for (int k = tap_of(s.x, ox); k < taps; k += kUp) sum += filter[k] * *from++;
      sums[i] = sum;
    }
    __syncthreads();
  }
  const int apart = height / kRows;  // a multiple of kUp, so that the rows of a thread meet the same taps
  for (int i = thread; i < t.planes * apart * width; i += kThreads) {
    const int ox = left + (i & (width - 1)), row = i >> t.log_w, p = row / apart, oy = top + row % apart;
    const int iy = p * t.in_h + pixel_of(s.y, oy) - first_y, step = apart * kDown / kUp;
    W sum[kRows] = {};
    if constexpr (kSeparable) {
      const W* from = sums + iy * width + (i & (width - 1));
      for (int k = tap_of(s.y, oy); k < taps; k += kUp, from += width) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) sum[j] += filter[k] * from[j * step * width];
      }
    } else {
      const W* from = pixels + iy * t.in_w + pixel_of(s.x, ox) - first_x;
      for (int ky = tap_of(s.y, oy); ky < s.y.taps; ky += kUp, from += t.in_w) {
        int column = 0;
        for (int kx = tap_of(s.x, ox); kx < s.x.taps; kx += kUp, ++column) {
          const W factor = filter[ky * s.x.taps + kx];
#pragma unroll
          for (int j = 0; j < kRows; ++j) sum[j] += factor * from[j * step * t.in_w + column];
        }
      }
    }
    if (first_plane + p >= t.all_planes || ox >= s.x.out) continue;
    T* to = y + ((first_plane + p) * s.y.out + oy) * s.x.out + ox;
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (oy + j * apart < s.y.out) to[static_cast<int64_t>(j) * apart * s.x.out] = narrow<T>(sum[j] * gain);
  }
}

int log2_up(int64_t value, int least, int most) {
  int log = least;
  while (log < most && int64_t{1} << log < value) ++log;
  return log;
}

// Pixels under so many neighbouring outputs.
int reach(const Axis& a, int outputs) { return ((outputs - 1) * a.down + a.taps - 1) / a.up + 1; }

// Runs the kernel of tiles if the scales are its own and a tile fits.
template <int kUp, int kDown, typename T, typename W>
bool tiled(const T* x, const W* f, T* y, const Sampling& s, bool separable, double gain, cudaStream_t stream) {
  if (s.x.up != kUp || s.y.up != kUp || s.x.down != kDown || s.y.down != kDown) return false;
  Tiling t{};
  t.log_w = log2_up(s.x.out, 3, 6);
  t.log_h = log2_up(s.y.out, 3, kDown == 1 ? 5 : 4);
  t.in_w = reach(s.x, 1 << t.log_w);
  t.in_h = reach(s.y, 1 << t.log_h);
  t.all_planes = s.images * s.channels;
  const int64_t taps = separable ? s.x.taps : int64_t{s.x.taps} * s.y.taps;
  const int64_t each = int64_t{t.in_h} * (t.in_w + (separable ? 1 << t.log_w : 0)) * sizeof(W);
  const int64_t room = kTileShared - taps * static_cast<int64_t>(sizeof(W));
  if (room < each) return false;
  t.planes = static_cast<int>(
      std::min({room / each, t.all_planes, std::max<int64_t>(1, kThreads * kRows >> (t.log_w + t.log_h))}));
  t.across = (s.x.out + (1 << t.log_w) - 1) >> t.log_w;
  t.down = (s.y.out + (1 << t.log_h) - 1) >> t.log_h;
  const int64_t blocks = (t.all_planes + t.planes - 1) / t.planes * t.across * t.down;
  if (blocks >= int64_t{1} << 31) return false;
  launch(separable ? upfirdn2d_tile_kernel<T, kUp, kDown, true, W> : upfirdn2d_tile_kernel<T, kUp, kDown, false, W>,
         dim3(static_cast<unsigned>(blocks)), kThreads, taps * sizeof(W) + t.planes * each, stream, x, f, y, s, t,
         static_cast<W>(gain));
  return true;
}

template <typename T, typename R, typename W>
void direct(const T* x, const W* f, R* y, const Sampling& s, double gain, cudaStream_t stream) {
  constexpr int kWide = 16 / std::max(sizeof(T), sizeof(R));
  const int64_t size = s.images * s.channels * s.x.out * s.y.out;
  const bool vectors = s.last && s.channels % kWide == 0 && aligned(x) && aligned(y);
  const int64_t items = vectors ? size / kWide : size;
  launch(vectors ? upfirdn2d_direct_kernel<T, R, kWide, W> : upfirdn2d_direct_kernel<T, R, 1, W>, blocks_for(items),
         kThreads, 0, stream, x, f, y, s, static_cast<W>(gain), items);
}

// x: [N, C, H, W], y: [N, C, H', W'], both contiguous or both channels last; f: [fh, fw], or [taps] of a separable
// filter, contiguous in fp32 (fp64 for fp64). pad_x, pad_y: zeros left of and above the upsampled image, or pixels
// cropped.
void upfirdn2d_fwd(const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y,
                   int64_t pad_x, int64_t pad_y, bool flip, double gain, const Tensor& y) {
  if (y.numel() == 0) return;
  const Gpu gpu(x);
  const bool separable = f.dim() == 1;
  const auto axis = [&](int64_t up, int64_t down, int64_t pad, int64_t dim) {
    return Axis{static_cast<int>(up), static_cast<int>(down), static_cast<int>(pad),
                static_cast<int>(f.size(separable ? 0 : dim - 2)), static_cast<int>(x.size(dim)),
                static_cast<int>(y.size(dim))};
  };
  const bool last = x.size(1) > 1 && (!x.is_contiguous() || !y.is_contiguous());
  const Sampling s{axis(up_x, down_x, pad_x, 3), axis(up_y, down_y, pad_y, 2), x.size(0), x.size(1), flip, last};
  for_dtype(x, "upfirdn2d", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const T* from = in<T>(x);
    T* to = out<T>(y);
    const W* filter = in<W>(f);
    if (!last && (tiled<1, 1>(from, filter, to, s, separable, gain, gpu.stream) ||
                  tiled<2, 1>(from, filter, to, s, separable, gain, gpu.stream) ||
                  tiled<1, 2>(from, filter, to, s, separable, gain, gpu.stream)))
      return;
    if (!separable) return direct(from, filter, to, s, gain, gpu.stream);
    const Tensor between = torch::stable::new_empty(f, {s.images, s.channels, s.y.size, s.x.out});
    Sampling along = s, across = s;
    along.y = Axis{1, 1, 0, 1, s.y.size, s.y.size};
    across.x = Axis{1, 1, 0, 1, s.x.out, s.x.out};
    direct(from, filter, out<W>(between), along, 1.0, gpu.stream);
    direct(in<W>(between), filter, to, across, gain, gpu.stream);
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "upfirdn2d_fwd(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int pad_x, int pad_y, bool flip, "
      "float gain, Tensor(a!) y) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("upfirdn2d_fwd", TORCH_BOX(&fastgen::upfirdn2d_fwd)); }
