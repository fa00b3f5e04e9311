// conv2d: two-dimensional convolution with what stands before and after it, on NHWC images; see fastgen/ops/conv2d.py.
//
// The output is cut into tiles of m x m (m = 1: pixels). For a stretch of tiles, held in cache:
//   1. the input, normalised and activated on the way, is transformed: v [F, tiles, C], F = (m + r - 1)^2 (Direct: the
//      rows of the padded input as they are, F = 1);
//   2. for each of the F numbers, v [tiles, C] times the transformed weights [C, K]; depth and order of each sum do
//      not depend on the stretch, so neither on threads nor batch;
//   3. the products are transformed back, and bias, residual and activation are applied before they are stored.
#pragma GCC optimize("fp-contract=fast", "no-tree-loop-distribute-patterns")

#include "conv2d.h"

#include <atomic>

namespace fastgen {
namespace {

constexpr int64_t kStretch = 4 << 20;      // bytes of padded input at once, for all threads
constexpr int64_t kMany = 128;             // tiles from which on threads work each on its own
constexpr int64_t kTiles = 24;             // tiles that one task computes together

// The padded, normalised input that Direct reads: rows [begin, end) of `height` rows for each image, from `image` on,
// the first at input row `top`. v: [images, height, cols, ld]
struct Pad {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(const Conv<W>* call, W* v, int64_t ld, int64_t image, int64_t top, int64_t height,
                        int64_t cols, int64_t begin, int64_t end) {
    const Conv<W>& p = *call;
    for (int64_t i = begin; i < end; ++i)
      for_blocks(p, p.c(), Simd<kIsa, W>::kLanes,
                 [&](const Block& block, int64_t at) __attribute__((always_inline)) {
                   load_row<kIsa>(p, block, image + i / height, top + i % height, cols, v + i * cols * ld + at, ld);
                 });
  }
};

// What a stretch of tiles is multiplied from. Winograd: row t of v at v + t * ld. Direct: the pixel where the
// window of tile t begins, `height` rows of `cols` pixels an image.
template <typename W>
struct Stretch {
  const W* v;
  int64_t stride, ld, first, tiles, height, cols;
  const Run* runs;
  int64_t nruns, depth;
};

// One panel of output columns for `count` rows: out [count, kPanel], kGroup apart.
struct Gemm {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(int64_t count, const W* const* rows, int64_t base, const Run* runs, int64_t nruns, const W* b,
                        W* out) {
    for (int64_t t = 0; t < count; t += kRows)
      gemm_rows<kIsa>(std::min(kRows, count - t), rows + t, base, runs, nruns, b, out + t * kGroup, kGroup);
  }
};

// Tiles [begin, end) of a stretch, for the channels [k0, k0 + kGroup) of one phase: their sums are transformed back,
// finished and stored. Returns 0 if all sums were finite, else NaN.
struct Finish {
  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY W run(F, const Conv<W>* p, int64_t first, int64_t begin, int64_t end, int64_t phase, int64_t k0,
                     const W* sums, int64_t apart) {
    const Grid<F> grid(*p);
    W bad = 0;
    for (int64_t t = begin; t < end; ++t)
      bad += tile<kIsa, F>(*p, grid, first, t, phase, k0, sums + (t - begin) * kGroup, apart);
    return bad;
  }

  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY W tile(const Conv<W>& p, const Grid<F>& grid, int64_t first, int64_t tile, int64_t phase, int64_t k0,
                      const W* sums, int64_t apart) {
    using S = Simd<kIsa, W>;
    using Vec = typename S::Vec;
    constexpr int kOut = F::kOut, kIn = F::kIn;
    const int64_t u = first + tile / grid.cols, image = u / grid.rows, kn = std::min(kGroup, p.k - k0);
    alignas(64) W tiles[kOut * kOut][kGroup];
    if constexpr (F::kTaps > 0) {
      for (int64_t e = 0; e < kn; e += S::kLanes) {
        Vec part[kIn][kOut];
        for (int i = 0; i < kIn; ++i) {
          Vec m[kIn];
          for (int j = 0; j < kIn; ++j) m[j] = S::load(sums + (i * kIn + j) * apart + e);
          F::output(m, part[i]);
        }
        for (int j = 0; j < kOut; ++j) {
          Vec m[kIn], y[kOut];
          for (int i = 0; i < kIn; ++i) m[i] = part[i][j];
          F::output(m, y);
          for (int i = 0; i < kOut; ++i) S::store(&tiles[i * kOut + j][e], y[i]);
        }
      }
    }
    Vec bad{};
    const W* bias = p.bias == nullptr ? nullptr : p.bias + image * p.bias_stride + k0;
    const int64_t shift_y = p.phases == 1 ? 0 : phase / 2, shift_x = p.phases == 1 ? 0 : phase % 2;
    const int64_t grow = p.phases == 1 ? 1 : 2;
    for (int i = 0; i < kOut; ++i)
      for (int j = 0; j < kOut; ++j) {
        const int64_t gy = u % grid.rows * kOut + i, gx = tile % grid.cols * kOut + j;
        const int64_t y = gy * grow - shift_y, x = gx * grow - shift_x;
        if (gy >= p.gh || gx >= p.gw || y < 0 || x < 0 || y >= p.yh || x >= p.yw) continue;
        pixel<kIsa>(p, F::kTaps > 0 ? tiles[i * kOut + j] : sums, bias, k0, kn, ((image * p.yh + y) * p.yw + x) * p.k + k0,
                    bad);
      }
    W sum = 0;
    for (int64_t l = 0; l < S::kLanes; ++l) sum += bad[l];
    return sum;
  }

  // Channels [k0, k0 + kn) of one pixel, from their sums: stored at `at`. bad becomes NaN if a sum is not finite.
  template <Isa kIsa, typename W>
  FASTGEN_BODY void pixel(const Conv<W>& p, const W* __restrict from, const W* bias, int64_t k0, int64_t kn, int64_t at,
                          typename Simd<kIsa, W>::Vec& bad) {
    using S = Simd<kIsa, W>;
    const W* gain = p.gain == nullptr ? nullptr : p.gain + k0;
    if (p.dtype == dtype_of<W> && kn % S::kLanes == 0) {
      W* to = static_cast<W*>(p.y) + at;
      const W* more = p.residual == nullptr ? nullptr : static_cast<const W*>(p.residual) + at;
      for (int64_t e = 0; e < kn; e += S::kLanes) {
        typename S::Vec z = S::load(from + e);
        bad += z - z;
        if (gain != nullptr) z *= S::load(gain + e);
        if (bias != nullptr) z += S::load(bias + e);
        if (more != nullptr) z += S::load(more + e);
        S::store(to + e, z);
      }
      return activate(p.act, to, kn);
    }
    alignas(64) W z[kGroup];
    W wrong = 0;
#pragma omp simd reduction(+ : wrong)
    for (int64_t c = 0; c < kn; ++c) {
      z[c] = from[c];
      wrong += from[c] - from[c];
    }
    bad[0] += wrong;
    if (gain != nullptr)
      for (int64_t c = 0; c < kn; ++c) z[c] *= gain[c];
    if (bias != nullptr)
      for (int64_t c = 0; c < kn; ++c) z[c] += bias[c];
    for_images<W>(p.dtype, [&](auto zero) __attribute__((always_inline)) {
      using T = decltype(zero);
      if (p.residual != nullptr) {
        const T* __restrict more = static_cast<const T*>(p.residual) + at;
        for (int64_t c = 0; c < kn; ++c) z[c] += static_cast<W>(more[c]);
      }
      activate(p.act, z, kn);
      T* __restrict to = static_cast<T*>(p.y) + at;
      for (int64_t c = 0; c < kn; ++c) to[c] = static_cast<T>(z[c]);
    });
  }
};

// Where row t of the left-hand side begins: that of a tile, or the pixel where its window does.
template <typename F, typename W>
const W* row_of(const Conv<W>& p, const Stretch<W>& s, const Grid<F>& grid, int64_t t) {
  if constexpr (F::kTaps > 0) return s.v + t * s.ld;
  const int64_t u = s.first + t / grid.cols, image = u / grid.rows - s.first / grid.rows;
  const int64_t y = (u % grid.rows - s.first % grid.rows) * p.sh;
  return s.v + ((image * s.height + y) * s.cols + t % grid.cols * p.sw) * s.ld;
}

// The outputs of tiles [t0, t1) of a stretch, at most kTiles, for the group of output panels that begins with `first`.
// Returns whether all sums were finite.
template <typename F, typename W>
bool multiply_piece(const Conv<W>& p, const Stretch<W>& s, int64_t phase, int64_t first, int64_t t0, int64_t t1) {
  constexpr int64_t kApart = kTiles * kGroup + kSkew;
  const Grid<F> grid(p);
  const int64_t panel = 2 * lanes<W>(), panels = (p.k + panel - 1) / panel;
  const int64_t here = std::min(kGroup / panel, panels - first);
  W* sums = static_cast<W*>(scratch<1>(kNumbers<F> * kApart * sizeof(W)));
  const W* rows[kTiles];
  for (int64_t t = t0; t < t1; ++t) rows[t - t0] = row_of(p, s, grid, t);
  const W* b = p.packed + (phase * panels + first) * kNumbers<F> * s.depth * panel;
  for (int64_t f = 0; f < kNumbers<F>; ++f)
    for (int64_t i = 0; i < here; ++i, b += s.depth * panel)
      multiversion<Gemm>(t1 - t0, static_cast<const W* const*>(rows), f * s.stride, s.runs, s.nruns, b,
                         sums + f * kApart + i * panel);
  return multiversion<Finish>(F{}, &p, s.first, t0, t1, phase, first * panel, static_cast<const W*>(sums), kApart) ==
         W(0);
}

// The tasks of a stretch, one for each phase, group of output channels and piece of the stretch.
template <typename F, typename W>
struct Tasks {
  const Conv<W>& p;
  const Stretch<W>& s;
  int64_t in_group = kGroup / (2 * lanes<W>()), groups = (p.k + kGroup - 1) / kGroup;
  int64_t blocks = (s.tiles + kRows - 1) / kRows, pieces = (s.tiles + kTiles - 1) / kTiles;

  int64_t count() const { return p.phases * groups * pieces; }
  bool run(int64_t task) const {
    const int64_t phase = task / pieces / groups, group = task / pieces % groups, piece = task % pieces;
    const int64_t t0 = blocks * piece / pieces * kRows, t1 = blocks * (piece + 1) / pieces * kRows;
    return multiply_piece<F>(p, s, phase, group * in_group, t0, std::min(t1, s.tiles));
  }
};

template <typename F, typename W>
bool multiply(const Conv<W>& p, const Stretch<W>& s) {
  const Tasks<F, W> tasks{p, s};
  std::atomic<bool> finite{true};
  take_turns(tasks.count(), [&](int64_t task) {
    if (!tasks.run(task)) finite = false;
  });
  return finite;
}

// Many tiles: each thread takes its own from beginning to end, and none waits for another. Few tiles: first all are
// transformed, then threads share the output channels, so that each reads its part of the weights only.
template <typename F, typename W>
bool winograd(const Conv<W>& p) {
  const Grid<F> grid(p);
  const int64_t ld = round_up(p.c1, lanes<W>()) + round_up(p.c2, lanes<W>());
  const Run runs[2] = {{0, p.c1}, {round_up(p.c1, lanes<W>()), p.c2}};
  const int64_t rows = p.n * grid.rows;
  const auto stretch = [&](int64_t first, int64_t count) {
    const int64_t tiles = count * grid.cols, stride = tiles * ld + kSkew;
    W* v = static_cast<W*>(scratch<0>(kNumbers<F> * stride * sizeof(W)));
    return Stretch<W>{v, stride, ld, first, tiles, 0, 0, runs, p.c2 > 0 ? 2 : 1, p.c()};
  };
  if (rows * grid.cols < kMany) {
    const Stretch<W> s = stretch(0, rows);
    transform<F>(p, const_cast<W*>(s.v), s.stride, ld, 0, rows);
    return multiply<F>(p, s);
  }
  // As many stretches for every thread, none larger than kTiles unless a single row is.
  const int64_t bytes = transform_bytes<F>(p), most = std::max<int64_t>(1, kTiles / grid.cols);
  const int64_t count = std::min(rows, round_up((rows + most - 1) / most, torch::stable::get_num_threads()));
  std::atomic<bool> finite{true};
  take_turns(count, [&](int64_t i) {
    const int64_t first = rows * i / count;
    const Stretch<W> s = stretch(first, rows * (i + 1) / count - first);
    W* strip = static_cast<W*>(scratch<2>(bytes));
    multiversion<Transform>(F{}, &p, const_cast<W*>(s.v), s.stride, ld, first, first, rows * (i + 1) / count, strip);
    const Tasks<F, W> tasks{p, s};
    for (int64_t task = 0; task < tasks.count(); ++task)
      if (!tasks.run(task)) finite = false;
  });
  return finite;
}

// Rows (or images) in stretches that fit kStretch: f(first, count).
template <typename F>
void for_stretches(int64_t rows, int64_t bytes_a_row, const F& f) {
  const int64_t most = std::max<int64_t>(1, kStretch / std::max<int64_t>(1, bytes_a_row));
  const int64_t count = (rows + most - 1) / most;
  for (int64_t i = 0; i < count; ++i) f(rows * i / count, rows * (i + 1) / count - rows * i / count);
}

// Windows are read where they lie: no copy of the input if it needs no padding, normalisation or conversion.
template <typename W>
bool direct(const Conv<W>& p) {
  const int64_t cols = (p.gw - 1) * p.sw + (p.kw - 1) * p.dw + 1;
  const int64_t reach = (p.kh - 1) * p.dh + 1, height = (p.gh - 1) * p.sh + reach;
  const bool as_it_is = p.dtype == dtype_of<W> && p.mean == nullptr && p.c2 == 0 && p.pt == 0 && p.pl == 0 &&
                        cols <= p.w && height <= p.h;
  const int64_t ld = as_it_is ? p.c1 : round_up(p.c1, lanes<W>()) + round_up(p.c2, lanes<W>());
  const int64_t wide = as_it_is ? p.w : cols;
  std::vector<Run> runs;
  for (int64_t r = 0; r < p.kh; ++r)
    for (int64_t s = 0; s < p.kw; ++s) {
      const int64_t at = (r * p.dh * wide + s * p.dw) * ld;
      runs.push_back({at, p.c1});
      if (p.c2 > 0) runs.push_back({at + round_up(p.c1, lanes<W>()), p.c2});
    }
  Stretch<W> s{nullptr, 0, ld, 0, 0, height, wide, runs.data(), static_cast<int64_t>(runs.size()), p.c() * p.taps()};
  if (as_it_is) {
    s.v = static_cast<const W*>(p.x), s.height = p.h, s.tiles = p.n * p.gh * p.gw;
    return multiply<Direct>(p, s);
  }
  bool finite = true;
  // Whole images, as many as fit; where not even one does, rows of one.
  const int64_t image_bytes = height * cols * ld * static_cast<int64_t>(sizeof(W));
  const auto piece = [&](int64_t image, int64_t images, int64_t row, int64_t count) {
    s.height = (count - 1) * p.sh + reach;
    s.first = image * p.gh + row, s.tiles = images * count * p.gw;
    W* v = static_cast<W*>(scratch<0>(images * s.height * cols * ld * sizeof(W)));
    torch::stable::parallel_for(0, images * s.height, 4, [&](int64_t begin, int64_t end) {
      multiversion<Pad>(&p, v, ld, image, row * p.sh - p.pt, s.height, cols, begin, end);
    });
    s.v = v;
    finite &= multiply<Direct>(p, s);
  };
  if (image_bytes <= kStretch)
    for_stretches(p.n, image_bytes, [&](int64_t image, int64_t images) { piece(image, images, 0, p.gh); });
  else
    for (int64_t image = 0; image < p.n; ++image)
      for_stretches(p.gh, image_bytes / p.gh, [&](int64_t row, int64_t count) { piece(image, 1, row, count); });
  return finite;
}

// x: [N, C1, H, W], skip: [N, C2, H, W], residual, y: [N, K, ., .], channels last; packed by conv2d_pack;
// mean, rstd: [N, G]; norm_weight, norm_bias: [C]; scale, shift: [N, C]; gain: [K]; bias: [K] or [N, K]; grid: the
// output's [gh, gw] as the engine counts it. Parameters are fp32 (fp64 for fp64). Returns whether all sums were finite.
int64_t conv2d_fwd(const Tensor& x, const OptTensor& skip, const Tensor& packed, const OptTensor& mean,
                   const OptTensor& rstd, const OptTensor& norm_weight, const OptTensor& norm_bias,
                   const OptTensor& scale, const OptTensor& shift, int64_t in_act, const OptTensor& gain,
                   const OptTensor& bias, const OptTensor& residual, int64_t act, int64_t kh, int64_t kw, int64_t sh,
                   int64_t sw, int64_t pt, int64_t pl, int64_t dh, int64_t dw, int64_t gh, int64_t gw, int64_t phases,
                   int64_t algorithm, const Tensor& y) {
  bool finite = true;
  for_dtype(x, "conv2d", [&](auto zero) {
    using W = Wide<decltype(zero)>;
    const int64_t c2 = skip ? skip->size(1) : 0;
    const Prologue<W> pro(x.size(0), x.size(1) + c2, mean, rstd, norm_weight, norm_bias, scale, shift);
    Conv<W> p{x.const_data_ptr(), skip ? skip->const_data_ptr() : nullptr,
              residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr()};
    p.dtype = x.scalar_type();
    if (mean) p.mean = pro.mean.data(), p.a = pro.a.data(), p.b = pro.b.data();
    p.gain = in<W>(gain), p.bias = in<W>(bias), p.packed = in<W>(packed);
    p.n = x.size(0), p.c1 = x.size(1), p.h = x.size(2), p.w = x.size(3), p.c2 = c2, p.k = y.size(1);
    p.kh = kh, p.kw = kw, p.sh = sh, p.sw = sw, p.pt = pt, p.pl = pl, p.dh = dh, p.dw = dw, p.phases = phases;
    p.gh = gh, p.gw = gw, p.yh = y.size(2), p.yw = y.size(3);
    p.bias_stride = bias && bias->dim() == 2 ? p.k : 0;
    p.in_act = static_cast<int>(in_act), p.act = static_cast<int>(act);
    finite = for_algorithm(algorithm, [&](auto f) {
      using F = decltype(f);
      if constexpr (F::kTaps == 0)
        return direct(p);
      else
        return winograd<F>(p);
    });
  });
  return finite;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "conv2d_fwd(Tensor x, Tensor? skip, Tensor packed, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? scale, Tensor? shift, int in_act, Tensor? gain, Tensor? bias, Tensor? residual, "
      "int act, int kh, int kw, int sh, int sw, int pt, int pl, int dh, int dw, int gh, int gw, int phases, "
      "int algorithm, Tensor(a!) y) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("conv2d_fwd", TORCH_BOX(&fastgen::conv2d_fwd)); }
