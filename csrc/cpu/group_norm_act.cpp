// group_norm_act: y = act((xhat w + b)(1 + scale) + shift), forward and backward; see fastgen/ops/group_norm_act.py.
//
// The tensor is walked in tiles: channels last, a block of pixels with a column a channel; contiguous, a piece
// of one channel's plane. Tiles have a fixed size and each writes its own slot, so results depend neither on
// the number of threads nor on the batch. Forward reads x twice and writes y once; statistics are centred
// within a tile, which stays in the cache, and tiles are merged by Chan's formula (Chan et al. 1979).
#include <cmath>
#include <vector>

#include "../common/activations.h"
#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kBuffer = 512;      // elements that pass through the activation at once, in L1
constexpr int64_t kTile = 16 * 1024;  // elements in a tile, in L2
constexpr int64_t kRows = 256;        // pixels in a channels-last tile, summed one after the other in fp32

// A tile's parameters: one entry a column (channels last) or a single one (contiguous).
template <bool kColumns, typename W>
FASTGEN_BODY W param(const W* p, int64_t column) {
  return p[kColumns ? column : 0];
}

template <int kAct, typename W>
FASTGEN_BODY void act_loop(W* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = act<kAct>(z[i]);
}
template <int kAct, typename W>
FASTGEN_BODY void act_grad_loop(W* z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = act_grad<kAct>(z[i]);
}
#define FASTGEN_ACT_SWITCH(code, loop, ...)               \
  switch (code) {                                         \
    case kRelu: loop<kRelu>(__VA_ARGS__); break;          \
    case kLeakyRelu: loop<kLeakyRelu>(__VA_ARGS__); break; \
    case kSilu: loop<kSilu>(__VA_ARGS__); break;          \
    case kGelu: loop<kGelu>(__VA_ARGS__); break;          \
    case kGeluTanh: loop<kGeluTanh>(__VA_ARGS__); break;  \
    case kTanh: loop<kTanh>(__VA_ARGS__); break;          \
    case kSigmoid: loop<kSigmoid>(__VA_ARGS__); break;    \
    default: loop<kNone>(__VA_ARGS__); break;             \
  }

// Mean and centred sum of squares of each column, or of the whole tile. x: [rows, cols], ld apart
template <bool kColumns, typename T>
FASTGEN_BODY void moments_body(const T* x, int64_t rows, int64_t cols, int64_t ld, Wide<T>* mean, Wide<T>* m2) {
  using W = Wide<T>;
  if constexpr (kColumns) {
    for (int64_t c = 0; c < cols; ++c) mean[c] = m2[c] = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) mean[c] += static_cast<W>(x[r * ld + c]);
    for (int64_t c = 0; c < cols; ++c) mean[c] /= static_cast<W>(rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const W d = static_cast<W>(x[r * ld + c]) - mean[c];
        m2[c] += d * d;
      }
  } else {
    W sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < cols; ++c) sum += static_cast<W>(x[c]);
    const W m = sum / static_cast<W>(cols);
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < cols; ++c) {
      const W d = static_cast<W>(x[c]) - m;
      squares += d * d;
    }
    *mean = m, *m2 = squares;
  }
}

// Pointers to a tile's parameters: z = (x - mean) rstd a + b, where a = w (1 + scale), b = bias (1 + scale) + shift.
template <typename W>
struct Params {
  const W *mean, *rstd, *a, *b;
};

// y = act(z). x: [rows, cols], ldx apart; y likewise
template <bool kColumns, typename T>
FASTGEN_BODY void apply_body(const T* x, int64_t ldx, T* y, int64_t ldy, int64_t rows, int64_t cols,
                             Params<Wide<T>> p, int code) {
  using W = Wide<T>;
  alignas(64) W z[kBuffer];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c0 = 0; c0 < cols; c0 += kBuffer) {
      const int64_t n = std::min(kBuffer, cols - c0);
      const T* source = x + r * ldx + c0;
      T* target = y + r * ldy + c0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = c0 + i;
        const W xhat = (static_cast<W>(source[i]) - param<kColumns>(p.mean, c)) * param<kColumns>(p.rstd, c);
        z[i] = xhat * param<kColumns>(p.a, c) + param<kColumns>(p.b, c);
      }
      FASTGEN_ACT_SWITCH(code, act_loop, z, n)
      for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(z[i]);
    }
}

// dz = dy act'(z), made again wherever it is needed. Fills xhat and dz: [n]
template <bool kColumns, typename T>
FASTGEN_BODY void dz_piece(const T* x, const T* dy, int64_t c0, int64_t n, Params<Wide<T>> p, int code, Wide<T>* xhat,
                           Wide<T>* dz) {
  using W = Wide<T>;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = c0 + i;
    xhat[i] = (static_cast<W>(x[i]) - param<kColumns>(p.mean, c)) * param<kColumns>(p.rstd, c);
    dz[i] = xhat[i] * param<kColumns>(p.a, c) + param<kColumns>(p.b, c);
  }
  FASTGEN_ACT_SWITCH(code, act_grad_loop, dz, n)
  for (int64_t i = 0; i < n; ++i) dz[i] *= static_cast<W>(dy[i]);
}

// s1 = sum dz, s2 = sum dz xhat, of each column or of the whole tile
template <bool kColumns, typename T>
FASTGEN_BODY void sums_body(const T* x, int64_t ldx, const T* dy, int64_t ldy, int64_t rows, int64_t cols,
                            Params<Wide<T>> p, int code, Wide<T>* s1, Wide<T>* s2) {
  using W = Wide<T>;
  alignas(64) W xhat[kBuffer];
  alignas(64) W dz[kBuffer];
  for (int64_t c = 0; c < (kColumns ? cols : 1); ++c) s1[c] = s2[c] = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c0 = 0; c0 < cols; c0 += kBuffer) {
      const int64_t n = std::min(kBuffer, cols - c0);
      dz_piece<kColumns>(x + r * ldx + c0, dy + r * ldy + c0, c0, n, p, code, xhat, dz);
      if constexpr (kColumns) {
        for (int64_t i = 0; i < n; ++i) s1[c0 + i] += dz[i];
        for (int64_t i = 0; i < n; ++i) s2[c0 + i] += dz[i] * xhat[i];
      } else {
        W a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = 0; i < n; ++i) a += dz[i], b += dz[i] * xhat[i];
        *s1 += a, *s2 += b;
      }
    }
}

// dx = rstd (a dz - g1 - xhat g2), g1 and g2 the group's means of a dz and a dz xhat
template <bool kColumns, typename T>
FASTGEN_BODY void dx_body(const T* x, int64_t ldx, const T* dy, int64_t ldy, T* dx, int64_t rows, int64_t cols,
                          Params<Wide<T>> p, const Wide<T>* g1, const Wide<T>* g2, int code) {
  using W = Wide<T>;
  alignas(64) W xhat[kBuffer];
  alignas(64) W dz[kBuffer];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c0 = 0; c0 < cols; c0 += kBuffer) {
      const int64_t n = std::min(kBuffer, cols - c0);
      dz_piece<kColumns>(x + r * ldx + c0, dy + r * ldy + c0, c0, n, p, code, xhat, dz);
      T* target = dx + r * ldx + c0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = c0 + i;
        const W inner = param<kColumns>(p.a, c) * dz[i] - param<kColumns>(g1, c) - xhat[i] * param<kColumns>(g2, c);
        target[i] = static_cast<T>(param<kColumns>(p.rstd, c) * inner);
      }
    }
}

// How x [N, C1, *] and skip [N, C2, *] lie in memory and are cut into tiles.
struct Geometry {
  int64_t n, c1, c2, c, s, groups;  // s: the product of the spatial sizes
  bool columns;                     // channels last
  int64_t step, tiles;              // positions in a tile; tiles along the positions

  Geometry(const Tensor& x, const OptTensor& skip, int64_t num_groups)
      : n(x.size(0)), c1(x.size(1)), c2(skip ? skip->size(1) : 0), c(c1 + c2), groups(num_groups) {
    s = x.numel() / (n * c1);
    columns = !x.is_contiguous();
    step = columns ? std::clamp<int64_t>(kTile / c, 1, kRows) : kTile;
    tiles = (s + step - 1) / step;
  }
  int64_t count(int64_t tile) const { return std::min(step, s - tile * step); }  // positions in a tile
};

// Calls f(image, tile, first channel, rows, cols, source, offset in it, its ld, offset in the whole, its ld).
template <typename F>
void for_tiles(const Geometry& g, const F& f) {
  const int64_t lines = g.columns ? 1 : g.c;
  torch::stable::parallel_for(0, g.n * lines * g.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / (lines * g.tiles), tile = i % g.tiles, at = tile * g.step, count = g.count(tile);
      if (g.columns) {
        for (int source = 0; source < (g.c2 > 0 ? 2 : 1); ++source) {
          const int64_t c0 = source == 0 ? 0 : g.c1, cs = source == 0 ? g.c1 : g.c2;
          f(image, tile, c0, count, cs, source, (image * g.s + at) * cs, cs, (image * g.s + at) * g.c + c0, g.c);
        }
      } else {
        const int64_t channel = i / g.tiles % lines;
        const int source = channel < g.c1 ? 0 : 1;
        const int64_t cs = source == 0 ? g.c1 : g.c2, local = source == 0 ? channel : channel - g.c1;
        f(image, tile, channel, int64_t{1}, count, source, (image * cs + local) * g.s + at, int64_t{0},
          (image * g.c + channel) * g.s + at, int64_t{0});
      }
    }
  });
}

// a, b of z = xhat a + b for every image and channel: [N, C]
template <typename W>
void fold(const Geometry& g, const OptTensor& weight, const OptTensor& bias, const OptTensor& scale,
          const OptTensor& shift, std::vector<W>& a, std::vector<W>& b) {
  for (int64_t i = 0; i < g.n * g.c; ++i) {
    const W one = scale ? W(1) + in<W>(scale)[i] : W(1);
    a[i] = weight ? in<W>(weight)[i % g.c] * one : one;
    b[i] = (bias ? in<W>(bias)[i % g.c] * one : W(0)) + (shift ? in<W>(shift)[i] : W(0));
  }
}

// A group's statistics for each of its channels, as tiles read them: [N, C]
template <typename W>
void spread(const Geometry& g, const W* per_group, std::vector<W>& per_channel) {
  const int64_t width = g.c / g.groups;
  for (int64_t i = 0; i < g.n * g.c; ++i) per_channel[i] = per_group[i / g.c * g.groups + i % g.c / width];
}

template <typename T>
void statistics(const Geometry& g, const T* const source[2], double eps, Wide<T>* mean, Wide<T>* rstd) {
  using W = Wide<T>;
  std::vector<W> means(g.n * g.tiles * g.c), m2s(g.n * g.tiles * g.c);  // [N, tiles, C]
  for_tiles(g, [&](int64_t n, int64_t tile, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset, int64_t ld,
                   int64_t, int64_t) {
    const int64_t slot = (n * g.tiles + tile) * g.c + c0;
    if (g.columns)
      multiversion<moments_body<true, T>>(source[k] + offset, rows, cols, ld, &means[slot], &m2s[slot]);
    else
      multiversion<moments_body<false, T>>(source[k] + offset, rows, cols, ld, &means[slot], &m2s[slot]);
  });
  const int64_t width = g.c / g.groups;
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t group = 0; group < g.groups; ++group) {
      double count = 0, average = 0, m2 = 0;
      for (int64_t tile = 0; tile < g.tiles; ++tile)
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
          const int64_t slot = (n * g.tiles + tile) * g.c + c;
          const double more = static_cast<double>(g.count(tile)), delta = means[slot] - average, total = count + more;
          average += delta * more / total;
          m2 += m2s[slot] + delta * delta * count * more / total;
          count = total;
        }
      mean[n * g.groups + group] = static_cast<W>(average);
      rstd[n * g.groups + group] = static_cast<W>(1.0 / std::sqrt(m2 / count + eps));
    }
}

// x: [N, C1, *], skip: [N, C2, *], y: [N, C, *], all in one dense layout; weight, bias: [C]; scale, shift: [N, C];
// mean, rstd: [N, G]. The parameters and statistics are fp32 (fp64 for fp64).
void group_norm_act_fwd(const Tensor& x, const OptTensor& skip, const OptTensor& weight, const OptTensor& bias,
                        const OptTensor& scale, const OptTensor& shift, int64_t num_groups, double eps, int64_t act,
                        const Tensor& y, const Tensor& mean, const Tensor& rstd) {
  const Geometry g(x, skip, num_groups);
  for_dtype(x, "group_norm_act", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const T* source[2] = {in<T>(x), in<T>(skip)};
    statistics(g, source, eps, out<W>(mean), out<W>(rstd));
    std::vector<W> a(g.n * g.c), b(g.n * g.c), m(g.n * g.c), r(g.n * g.c);
    fold(g, weight, bias, scale, shift, a, b);
    spread(g, in<W>(mean), m);
    spread(g, in<W>(rstd), r);
    T* target = out<T>(y);
    for_tiles(g, [&](int64_t n, int64_t, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset, int64_t ld,
                     int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0;
      const Params<W> p{&m[i], &r[i], &a[i], &b[i]};
      const int code = static_cast<int>(act);
      if (g.columns)
        multiversion<apply_body<true, T>>(source[k] + offset, ld, target + whole, ldy, rows, cols, p, code);
      else
        multiversion<apply_body<false, T>>(source[k] + offset, ld, target + whole, ldy, rows, cols, p, code);
    });
  });
}

// The group's means of a dz and of a dz xhat, from the channels' sums, for each channel: [N, C]
template <typename W>
void group_means(const Geometry& g, const std::vector<W>& a, const W* sums, std::vector<W>& means) {
  const int64_t width = g.c / g.groups;
  for (int64_t i = 0; i < g.n * g.c; i += width) {
    double sum = 0;
    for (int64_t c = i; c < i + width; ++c) sum += static_cast<double>(a[c]) * sums[c];
    std::fill_n(means.begin() + i, width, static_cast<W>(sum / static_cast<double>(width * g.s)));
  }
}

// dy: [N, C, *]; dx: [N, C1, *]; dskip: [N, C2, *]; sum_dz, sum_dz_xhat: [N, C]; the rest as in the forward
void group_norm_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& skip, const OptTensor& weight,
                        const OptTensor& bias, const OptTensor& scale, const OptTensor& shift, const Tensor& mean,
                        const Tensor& rstd, int64_t num_groups, int64_t act, const Tensor& dx, const OptTensor& dskip,
                        const Tensor& sum_dz, const Tensor& sum_dz_xhat) {
  const Geometry g(x, skip, num_groups);
  const int code = static_cast<int>(act);
  for_dtype(x, "group_norm_act_bwd", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const T* source[2] = {in<T>(x), in<T>(skip)};
    T* target[2] = {out<T>(dx), out<T>(dskip)};
    const int64_t nc = g.n * g.c;
    std::vector<W> a(nc), b(nc), m(nc), r(nc), g1(nc), g2(nc), parts1(nc * g.tiles), parts2(nc * g.tiles);
    fold(g, weight, bias, scale, shift, a, b);
    spread(g, in<W>(mean), m);
    spread(g, in<W>(rstd), r);
    for_tiles(g, [&](int64_t n, int64_t tile, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset,
                     int64_t ld, int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0, slot = (n * g.tiles + tile) * g.c + c0;
      const Params<W> p{&m[i], &r[i], &a[i], &b[i]};
      const T* up = in<T>(dy) + whole;
      if (g.columns)
        multiversion<sums_body<true, T>>(source[k] + offset, ld, up, ldy, rows, cols, p, code, &parts1[slot],
                                         &parts2[slot]);
      else
        multiversion<sums_body<false, T>>(source[k] + offset, ld, up, ldy, rows, cols, p, code, &parts1[slot],
                                          &parts2[slot]);
    });
    W *s1 = out<W>(sum_dz), *s2 = out<W>(sum_dz_xhat);
    for (int64_t i = 0; i < nc; ++i) {
      double t1 = 0, t2 = 0;
      for (int64_t tile = 0; tile < g.tiles; ++tile) {
        t1 += parts1[(i / g.c * g.tiles + tile) * g.c + i % g.c];
        t2 += parts2[(i / g.c * g.tiles + tile) * g.c + i % g.c];
      }
      s1[i] = static_cast<W>(t1), s2[i] = static_cast<W>(t2);
    }
    group_means(g, a, s1, g1);
    group_means(g, a, s2, g2);
    for_tiles(g, [&](int64_t n, int64_t, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset, int64_t ld,
                     int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0;
      const Params<W> p{&m[i], &r[i], &a[i], &b[i]};
      const T* up = in<T>(dy) + whole;
      if (g.columns)
        multiversion<dx_body<true, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, &g1[i],
                                       &g2[i], code);
      else
        multiversion<dx_body<false, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, &g1[i],
                                        &g2[i], code);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "group_norm_act_fwd(Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "int num_groups, float eps, int act, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "group_norm_act_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, Tensor mean, Tensor rstd, int num_groups, int act, Tensor(a!) dx, Tensor(b!)? dskip, "
      "Tensor(c!) sum_dz, Tensor(d!) sum_dz_xhat) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("group_norm_act_fwd", TORCH_BOX(&fastgen::group_norm_act_fwd));
  m.impl("group_norm_act_bwd", TORCH_BOX(&fastgen::group_norm_act_bwd));
}
