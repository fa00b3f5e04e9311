// group_norm_act: y = act((xhat w + b)(1 + scale) + shift), forward and backward; see fastgen/ops/group_norm_act.py.
//
// The tensor is walked in tiles: channels last, a block of pixels with a column a channel; contiguous, a piece
// of one channel's plane. Tiles have a fixed size and each writes its own slot, so results depend neither on
// the number of threads nor on the batch. Forward reads x twice and writes y once; statistics are centred
// within a tile, which stays in the cache, and tiles are pooled around the group's mean.
// The build forbids contraction for the sake of the noise, of which there is none here: a multiplication and an
// addition may become one fused instruction.
#pragma GCC optimize("fp-contract=fast")

#include <cmath>
#include <numeric>
#include <vector>

#include "activations.h"
#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kBuffer = 1024;     // elements that pass through the activation at once, in L1
constexpr int64_t kTile = 16 * 1024;  // elements in a tile, in L2
constexpr int64_t kLanes = 64;        // partial sums of a long row
constexpr int64_t kRows = 64;         // pixels in a channels-last tile, summed one after the other in fp32

// A tile's parameters: one entry a column (channels last) or a single one (contiguous).
template <bool kColumns, typename W>
FASTGEN_BODY W param(const W* p, int64_t column) {
  return p[kColumns ? column : 0];
}

// The sum of term(i), i < n, in kLanes lanes: short chains of fp32 additions, and several vectors at once.
template <typename W, typename F>
FASTGEN_BODY W lane_sum(int64_t n, const F& term) {
  alignas(64) W lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  for (int64_t l = 0; i + l < n; ++l) lanes[l] += term(i + l);
  return fold_lanes(lanes, kLanes);
}

// Mean and centred sum of squares of each column, or of the whole tile. x: [rows, cols], ld apart
template <bool kColumns, typename T>
FASTGEN_BODY void moments_body(const T* __restrict x, int64_t rows, int64_t cols, int64_t ld,
                               Wide<T>* __restrict mean, Wide<T>* __restrict m2) {
  using W = Wide<T>;
  if constexpr (kColumns) {
    for (int64_t c = 0; c < cols; ++c) mean[c] = m2[c] = 0;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {  // four rows a visit: a quarter of the loads and stores of the sums
      const T* q = x + r * ld;
      for (int64_t c = 0; c < cols; ++c)
        mean[c] += (static_cast<W>(q[c]) + static_cast<W>(q[ld + c])) +
                   (static_cast<W>(q[2 * ld + c]) + static_cast<W>(q[3 * ld + c]));
    }
    for (; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) mean[c] += static_cast<W>(x[r * ld + c]);
    for (int64_t c = 0; c < cols; ++c) mean[c] /= static_cast<W>(rows);
    for (r = 0; r + 4 <= rows; r += 4) {
      const T* q = x + r * ld;
      for (int64_t c = 0; c < cols; ++c) {
        const W d0 = static_cast<W>(q[c]) - mean[c], d1 = static_cast<W>(q[ld + c]) - mean[c];
        const W d2 = static_cast<W>(q[2 * ld + c]) - mean[c], d3 = static_cast<W>(q[3 * ld + c]) - mean[c];
        m2[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
      }
    }
    for (; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const W d = static_cast<W>(x[r * ld + c]) - mean[c];
        m2[c] += d * d;
      }
  } else {
    const W m = lane_sum<W>(cols, [&](int64_t c) __attribute__((always_inline)) { return static_cast<W>(x[c]); }) /
                static_cast<W>(cols);
    *mean = m;
    *m2 = lane_sum<W>(cols, [&](int64_t c) __attribute__((always_inline)) {
      const W d = static_cast<W>(x[c]) - m;
      return d * d;
    });
  }
}

// A tile's parameters: z = (x - mean) a + b, where a = rstd w (1 + scale), b = bias (1 + scale) + shift.
template <typename W>
struct Params {
  const W *mean, *a, *b;
};

// Calls f(first row, rows, first column, columns) for blocks of at most kBuffer elements: several short rows, so
// that the activation's loop is long, or a piece of a long one.
template <typename F>
FASTGEN_BODY void for_blocks(int64_t rows, int64_t cols, const F& f) {
  const int64_t width = std::min(cols, kBuffer), height = std::max<int64_t>(1, kBuffer / width);
  for (int64_t r = 0; r < rows; r += height)
    for (int64_t c = 0; c < cols; c += width) f(r, std::min(height, rows - r), c, std::min(width, cols - c));
}

// y = act(z). x: [rows, cols], ldx apart; y likewise
template <bool kColumns, typename T>
FASTGEN_BODY void apply_body(const T* __restrict x, int64_t ldx, T* __restrict y, int64_t ldy, int64_t rows,
                             int64_t cols, Params<Wide<T>> p, int code) {
  using W = Wide<T>;
  alignas(64) W z[kBuffer];
  for_blocks(rows, cols, [&](int64_t r0, int64_t nr, int64_t c0, int64_t nc) __attribute__((always_inline)) {
    const auto normalise = [&](W* __restrict to) __attribute__((always_inline)) {
      for (int64_t r = 0; r < nr; ++r) {
        const T* source = x + (r0 + r) * ldx + c0;
        for (int64_t i = 0; i < nc; ++i) {
          const W d = static_cast<W>(source[i]) - param<kColumns>(p.mean, c0 + i);
          to[r * nc + i] = d * param<kColumns>(p.a, c0 + i) + param<kColumns>(p.b, c0 + i);
        }
      }
      activate(code, to, nr * nc);
    };
    if constexpr (std::is_same_v<T, W>)
      if (nr == 1 || ldy == nc) return normalise(y + r0 * ldy + c0);
    normalise(z);
    for (int64_t r = 0; r < nr; ++r) {
      T* target = y + (r0 + r) * ldy + c0;
      for (int64_t i = 0; i < nc; ++i) target[i] = static_cast<T>(z[r * nc + i]);
    }
  });
}

// The block's d = x - mean and dz = dy act'(z), [nr * nc] each; made again wherever they are needed.
template <bool kColumns, typename T>
FASTGEN_BODY void dz_block(const T* __restrict x, int64_t ldx, const T* __restrict dy, int64_t ldy, int64_t nr,
                           int64_t nc, int64_t c0, Params<Wide<T>> p, int code, Wide<T>* __restrict d,
                           Wide<T>* __restrict dz) {
  using W = Wide<T>;
  for (int64_t r = 0; r < nr; ++r)
    for (int64_t i = 0; i < nc; ++i) {
      const W centred = static_cast<W>(x[r * ldx + i]) - param<kColumns>(p.mean, c0 + i);
      d[r * nc + i] = centred;
      dz[r * nc + i] = centred * param<kColumns>(p.a, c0 + i) + param<kColumns>(p.b, c0 + i);
    }
  activate_grad(code, dz, nr * nc);
  for (int64_t r = 0; r < nr; ++r)
    for (int64_t i = 0; i < nc; ++i) dz[r * nc + i] *= static_cast<W>(dy[r * ldy + i]);
}

// s1 = sum dz, s2 = sum dz (x - mean), of each column or of the whole tile. Where dz loses nothing in T, it is left
// in dx for the second pass, which then needs no activation.
template <bool kColumns, typename T>
FASTGEN_BODY void sums_body(const T* x, int64_t ldx, const T* dy, int64_t ldy, T* __restrict dx, int64_t rows,
                            int64_t cols, Params<Wide<T>> p, int code, Wide<T>* __restrict s1,
                            Wide<T>* __restrict s2) {
  using W = Wide<T>;
  alignas(64) W d[kBuffer];
  alignas(64) W dz[kBuffer];
  for (int64_t c = 0; c < (kColumns ? cols : 1); ++c) s1[c] = s2[c] = 0;
  for_blocks(rows, cols, [&](int64_t r0, int64_t nr, int64_t c0, int64_t nc) __attribute__((always_inline)) {
    dz_block<kColumns>(x + r0 * ldx + c0, ldx, dy + r0 * ldy + c0, ldy, nr, nc, c0, p, code, d, dz);
    if constexpr (std::is_same_v<T, W>)
      for (int64_t r = 0; r < nr; ++r) std::copy_n(dz + r * nc, nc, dx + (r0 + r) * ldx + c0);
    if constexpr (kColumns) {
      for (int64_t r = 0; r < nr; ++r)
        for (int64_t i = 0; i < nc; ++i) {
          s1[c0 + i] += dz[r * nc + i];
          s2[c0 + i] += dz[r * nc + i] * d[r * nc + i];
        }
    } else {
      *s1 += lane_sum<W>(nc, [&](int64_t i) __attribute__((always_inline)) { return dz[i]; });
      *s2 += lane_sum<W>(nc, [&](int64_t i) __attribute__((always_inline)) { return dz[i] * d[i]; });
    }
  });
}

// dx = a dz - k1 - (x - mean) k2; see group_means
template <bool kColumns, typename T>
FASTGEN_BODY void dx_body(const T* x, int64_t ldx, const T* dy, int64_t ldy, T* __restrict dx, int64_t rows,
                          int64_t cols, Params<Wide<T>> p, const Wide<T>* __restrict k1, const Wide<T>* __restrict k2,
                          int code) {
  using W = Wide<T>;
  if constexpr (std::is_same_v<T, W>) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const W centred = x[r * ldx + c] - param<kColumns>(p.mean, c), dz = dx[r * ldx + c];
        dx[r * ldx + c] = param<kColumns>(p.a, c) * dz - param<kColumns>(k1, c) - centred * param<kColumns>(k2, c);
      }
    return;
  }
  alignas(64) W d[kBuffer];
  alignas(64) W dz[kBuffer];
  for_blocks(rows, cols, [&](int64_t r0, int64_t nr, int64_t c0, int64_t nc) __attribute__((always_inline)) {
    dz_block<kColumns>(x + r0 * ldx + c0, ldx, dy + r0 * ldy + c0, ldy, nr, nc, c0, p, code, d, dz);
    for (int64_t r = 0; r < nr; ++r) {
      T* target = dx + (r0 + r) * ldx + c0;
      for (int64_t i = 0; i < nc; ++i) {
        const W scaled = param<kColumns>(p.a, c0 + i) * dz[r * nc + i];
        target[i] = static_cast<T>(scaled - param<kColumns>(k1, c0 + i) - d[r * nc + i] * param<kColumns>(k2, c0 + i));
      }
    }
  });
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

// a, b of z = (x - mean) a + b for every image and channel: [N, C]
template <typename W>
void fold(const Geometry& g, const OptTensor& weight, const OptTensor& bias, const OptTensor& scale,
          const OptTensor& shift, const std::vector<W>& rstd, std::vector<W>& a, std::vector<W>& b) {
  const W *w = in<W>(weight), *beta = in<W>(bias), *gamma = in<W>(scale), *delta = in<W>(shift);
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t c = 0, i = n * g.c; c < g.c; ++c, ++i) {
      const W one = gamma != nullptr ? W(1) + gamma[i] : W(1);
      a[i] = (w != nullptr ? w[c] * one : one) * rstd[i];
      b[i] = (beta != nullptr ? beta[c] * one : W(0)) + (delta != nullptr ? delta[i] : W(0));
    }
}

// A group's statistics for each of its channels, as tiles read them: [N, C]
template <typename W>
void spread(const Geometry& g, const W* per_group, std::vector<W>& per_channel) {
  const int64_t width = g.c / g.groups;
  for (int64_t i = 0; i < g.n * g.groups; ++i) std::fill_n(per_channel.begin() + i * width, width, per_group[i]);
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
  // Channel by channel, then group by group; around the group's mean, so that nothing cancels.
  const int64_t width = g.c / g.groups;
  const double total = static_cast<double>(width * g.s);
  std::vector<double> sums(g.c), centre(g.c);
  const auto group_sum = [&](int64_t group) {
    return std::accumulate(sums.begin() + group * width, sums.begin() + (group + 1) * width, 0.0);
  };
  for (int64_t n = 0; n < g.n; ++n) {
    const W *means_n = &means[n * g.tiles * g.c], *m2s_n = &m2s[n * g.tiles * g.c];
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t tile = 0, i = 0; tile < g.tiles; ++tile)
      for (int64_t c = 0; c < g.c; ++c, ++i) sums[c] += static_cast<double>(g.count(tile)) * means_n[i];
    for (int64_t group = 0; group < g.groups; ++group) {
      const double average = group_sum(group) / total;
      std::fill_n(&centre[group * width], width, average);
      mean[n * g.groups + group] = static_cast<W>(average);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t tile = 0, i = 0; tile < g.tiles; ++tile)
      for (int64_t c = 0; c < g.c; ++c, ++i) {
        const double delta = means_n[i] - centre[c];
        sums[c] += m2s_n[i] + static_cast<double>(g.count(tile)) * delta * delta;
      }
    for (int64_t group = 0; group < g.groups; ++group)
      rstd[n * g.groups + group] = static_cast<W>(1.0 / std::sqrt(group_sum(group) / total + eps));
  }
}

// Only the statistics of the groups; see group_norm_act_fwd.
void group_norm_act_statistics(const Tensor& x, const OptTensor& skip, int64_t num_groups, double eps,
                               const Tensor& mean, const Tensor& rstd) {
  const Geometry g(x, skip, num_groups);
  for_dtype(x, "group_norm_act", [&](auto zero) {
    using T = decltype(zero);
    const T* source[2] = {in<T>(x), in<T>(skip)};
    statistics(g, source, eps, out<Wide<T>>(mean), out<Wide<T>>(rstd));
  });
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
    spread(g, in<W>(mean), m);
    spread(g, in<W>(rstd), r);
    fold(g, weight, bias, scale, shift, r, a, b);
    T* target = out<T>(y);
    for_tiles(g, [&](int64_t n, int64_t, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset, int64_t ld,
                     int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0;
      const Params<W> p{&m[i], &a[i], &b[i]};
      const int code = static_cast<int>(act);
      if (g.columns)
        multiversion<apply_body<true, T>>(source[k] + offset, ld, target + whole, ldy, rows, cols, p, code);
      else
        multiversion<apply_body<false, T>>(source[k] + offset, ld, target + whole, ldy, rows, cols, p, code);
    });
  });
}

// The sum over tiles, [N, tiles, C] -> [N, C]
template <typename W>
void add_tiles(const Geometry& g, const std::vector<W>& parts, std::vector<W>& sums) {
  std::vector<double> total(g.c);
  for (int64_t n = 0; n < g.n; ++n) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t tile = 0; tile < g.tiles; ++tile)
      for (int64_t c = 0; c < g.c; ++c) total[c] += parts[(n * g.tiles + tile) * g.c + c];
    for (int64_t c = 0; c < g.c; ++c) sums[n * g.c + c] = static_cast<W>(total[c]);
  }
}

// k1 = mean(a dz) and k2 = rstd² mean(a dz (x - mean)), means over a group, from the channels' sums; for each
// channel: [N, C]. With them dx = rstd (A dz - mean(A dz) - xhat mean(A dz xhat)) is a dz - k1 - (x - mean) k2.
template <typename W>
void group_means(const Geometry& g, const std::vector<W>& a, const std::vector<W>& rstd, const std::vector<W>& s1,
                 const std::vector<W>& s2, std::vector<W>& k1, std::vector<W>& k2) {
  const int64_t width = g.c / g.groups;
  for (int64_t i = 0; i < g.n * g.c; i += width) {
    double sum1 = 0, sum2 = 0;
    for (int64_t c = i; c < i + width; ++c) {
      sum1 += static_cast<double>(a[c]) * s1[c];
      sum2 += static_cast<double>(a[c]) * s2[c];
    }
    const double m = static_cast<double>(width * g.s), variance = static_cast<double>(rstd[i]) * rstd[i];
    std::fill_n(k1.begin() + i, width, static_cast<W>(sum1 / m));
    std::fill_n(k2.begin() + i, width, static_cast<W>(variance * sum2 / m));
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
    std::vector<W> a(nc), b(nc), m(nc), r(nc), s1(nc), s2(nc), k1(nc), k2(nc);
    std::vector<W> parts1(nc * g.tiles), parts2(nc * g.tiles);
    spread(g, in<W>(mean), m);
    spread(g, in<W>(rstd), r);
    fold(g, weight, bias, scale, shift, r, a, b);
    for_tiles(g, [&](int64_t n, int64_t tile, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset,
                     int64_t ld, int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0, slot = (n * g.tiles + tile) * g.c + c0;
      const Params<W> p{&m[i], &a[i], &b[i]};
      const T* up = in<T>(dy) + whole;
      if (g.columns)
        multiversion<sums_body<true, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, code,
                                         &parts1[slot], &parts2[slot]);
      else
        multiversion<sums_body<false, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, code,
                                          &parts1[slot], &parts2[slot]);
    });
    add_tiles(g, parts1, s1);
    add_tiles(g, parts2, s2);
    for (int64_t i = 0; i < nc; ++i) {
      out<W>(sum_dz)[i] = s1[i];
      out<W>(sum_dz_xhat)[i] = s2[i] * r[i];
    }
    group_means(g, a, r, s1, s2, k1, k2);
    for_tiles(g, [&](int64_t n, int64_t, int64_t c0, int64_t rows, int64_t cols, int k, int64_t offset, int64_t ld,
                     int64_t whole, int64_t ldy) {
      const int64_t i = n * g.c + c0;
      const Params<W> p{&m[i], &a[i], &b[i]};
      const T* up = in<T>(dy) + whole;
      if (g.columns)
        multiversion<dx_body<true, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, &k1[i],
                                       &k2[i], code);
      else
        multiversion<dx_body<false, T>>(source[k] + offset, ld, up, ldy, target[k] + offset, rows, cols, p, &k1[i],
                                        &k2[i], code);
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
      "group_norm_act_statistics(Tensor x, Tensor? skip, int num_groups, float eps, Tensor(a!) mean, "
      "Tensor(b!) rstd) -> ()");
  m.def(
      "group_norm_act_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor? weight, Tensor? bias, Tensor? scale, "
      "Tensor? shift, Tensor mean, Tensor rstd, int num_groups, int act, Tensor(a!) dx, Tensor(b!)? dskip, "
      "Tensor(c!) sum_dz, Tensor(d!) sum_dz_xhat) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("group_norm_act_fwd", TORCH_BOX(&fastgen::group_norm_act_fwd));
  m.impl("group_norm_act_statistics", TORCH_BOX(&fastgen::group_norm_act_statistics));
  m.impl("group_norm_act_bwd", TORCH_BOX(&fastgen::group_norm_act_bwd));
}
