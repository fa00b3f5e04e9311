// batch_norm_act: y = act(xhat w + b + residual), forward and backward; see fastgen/ops/batch_norm_act.py.
//
// The tensor is walked in tiles, small matrices: channels last, pixels by a block of channels; contiguous, images
// by a piece of one channel's plane. Tiles have a fixed size and each writes its own slot, so results do not depend
// on the number of threads. Statistics are centred within a tile, in fp32, and tiles are pooled in fp64.
// A normalisation over the batch needs all of a channel before it can write any of it. Where a channel fits into
// the cache, a thread does both passes over it before it takes the next one, and memory is read once.
// There is no noise here, so a multiplication and an addition may become one fused instruction.
#pragma GCC optimize("fp-contract=fast")

#include <cmath>
#include <vector>

#include "../common/activations.h"
#include "activations.h"
#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kTile = 4096;             // elements in a contiguous tile
constexpr int64_t kRows = 64, kCols = 512;  // pixels and channels in a channels-last tile
constexpr int64_t kGroup = 8;               // pixels that are summed one after the other
constexpr int64_t kLanes = 64;              // partial sums of a contiguous tile
constexpr int64_t kBuffer = 1024;           // elements that pass through an activation at once; at least kCols
constexpr int64_t kGrain = 32 * 1024;       // elements that are worth a thread
constexpr int64_t kCached = 512 * 1024;     // bytes of a channel that stay in the cache between two passes
constexpr int64_t kManyChannels = 32;       // enough for every thread to have channels of its own

// z = (x - mean) a + b + residual, where a = rstd w: one entry a column (channels last) or a single one.
template <typename W>
struct Params {
  const W *mean, *a, *b;
};

template <bool kColumns, typename W>
FASTGEN_BODY W param(const W* p, int64_t column) {
  return p[kColumns ? column : 0];
}

// These are no more than a comparison: their loops need no buffer.
FASTGEN_BODY bool is_linear(int code) { return code == kNone || code == kRelu || code == kLeakyRelu; }

// Calls f(first row, rows) for parts of a tile, after each of which partial sums are to be put aside: a chain of fp32
// additions is never long. A contiguous tile has lanes enough to keep them short.
template <bool kColumns, typename F>
FASTGEN_BODY void for_groups(int64_t rows, const F& f) {
  const int64_t height = kColumns ? kGroup : rows;
  for (int64_t r = 0; r < rows; r += height) f(r, std::min(height, rows - r));
}

template <typename W>
FASTGEN_BODY void put_aside(W* __restrict part, W* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += part[i], part[i] = 0;
}

// Adds up term(offset, column) over a tile: per column, or into kLanes lanes.
template <bool kColumns, typename W, typename F>
FASTGEN_BODY void add_up(int64_t rows, int64_t cols, int64_t ld, W* __restrict sums, const F& term) {
  constexpr int64_t kLength = kColumns ? kCols : kLanes;
  alignas(64) W part[kLength] = {};
  const int64_t length = kColumns ? cols : kLanes;
  std::fill_n(sums, length, W(0));
  for_groups<kColumns>(rows, [&](int64_t r0, int64_t nr) __attribute__((always_inline)) {
    for (int64_t r = r0; r < r0 + nr; ++r)
      for (int64_t i = 0; i < cols; i += length) {
        const int64_t n = std::min(length, cols - i);
        for (int64_t l = 0; l < n; ++l) part[l] += term(r * ld + i + l, i + l);
      }
    put_aside(part, sums, length);
  });
}

// Mean and centred sum of squares of each column, or of the whole tile. The mean is summed as a distance from the
// first element: a large mean costs no digits.
template <bool kColumns, typename T>
FASTGEN_BODY void moments_body(const T* __restrict x, int64_t rows, int64_t cols, int64_t ld,
                               Wide<T>* __restrict mean, Wide<T>* __restrict m2) {
  using W = Wide<T>;
  alignas(64) W sums[kColumns ? kCols : kLanes];
  add_up<kColumns>(rows, cols, ld, sums, [&](int64_t at, int64_t c) __attribute__((always_inline)) {
    return static_cast<W>(x[at]) - static_cast<W>(x[kColumns ? c : 0]);
  });
  if constexpr (kColumns)
    for (int64_t c = 0; c < cols; ++c) mean[c] = static_cast<W>(x[c]) + sums[c] / static_cast<W>(rows);
  else
    *mean = static_cast<W>(*x) + fold_lanes(sums, kLanes) / static_cast<W>(rows * cols);
  const W first = *mean;
  add_up<kColumns>(rows, cols, ld, sums, [&](int64_t at, int64_t c) __attribute__((always_inline)) {
    const W d = static_cast<W>(x[at]) - (kColumns ? mean[c] : first);
    return d * d;
  });
  if constexpr (kColumns)
    for (int64_t c = 0; c < cols; ++c) m2[c] = sums[c];
  else
    *m2 = fold_lanes(sums, kLanes);
}

template <bool kColumns, bool kResidual, typename T>
FASTGEN_BODY Wide<T> z_at(const T* x, const T* residual, int64_t at, int64_t c, const Params<Wide<T>>& p) {
  using W = Wide<T>;
  const W z = (static_cast<W>(x[at]) - param<kColumns>(p.mean, c)) * param<kColumns>(p.a, c) + param<kColumns>(p.b, c);
  return kResidual ? z + static_cast<W>(residual[at]) : z;
}

// z of n elements from offset at and column c on. residual may be null
template <bool kColumns, typename T>
FASTGEN_BODY void z_row(const T* x, const T* residual, int64_t at, int64_t c, int64_t n, const Params<Wide<T>>& p,
                        Wide<T>* __restrict z) {
  if (residual != nullptr)
    for (int64_t i = 0; i < n; ++i) z[i] = z_at<kColumns, true>(x, residual, at + i, c + i, p);
  else
    for (int64_t i = 0; i < n; ++i) z[i] = z_at<kColumns, false>(x, residual, at + i, c + i, p);
}

template <int kAct, bool kColumns, bool kResidual, typename T>
FASTGEN_BODY void apply_linear(const T* __restrict x, const T* __restrict residual, T* __restrict y, int64_t rows,
                               int64_t cols, int64_t ld, Params<Wide<T>> p) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0, at = r * ld; c < cols; ++c)
      y[at + c] = static_cast<T>(act<kAct>(z_at<kColumns, kResidual>(x, residual, at + c, c, p)));
}

// y = act(z). x, residual (may be null), y: [rows, cols], ld apart
template <bool kColumns, typename T>
FASTGEN_BODY void apply_body(const T* __restrict x, const T* __restrict residual, T* __restrict y, int64_t rows,
                             int64_t cols, int64_t ld, Params<Wide<T>> p, int code) {
#define FASTGEN_LINEAR(act)                                                       \
  if (residual != nullptr)                                                        \
    return apply_linear<act, kColumns, true>(x, residual, y, rows, cols, ld, p);  \
  return apply_linear<act, kColumns, false>(x, residual, y, rows, cols, ld, p);
  switch (code) {
    case kNone: FASTGEN_LINEAR(kNone)
    case kRelu: FASTGEN_LINEAR(kRelu)
    case kLeakyRelu: FASTGEN_LINEAR(kLeakyRelu)
  }
#undef FASTGEN_LINEAR
  alignas(64) Wide<T> z[kBuffer];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += kBuffer) {
      const int64_t n = std::min(kBuffer, cols - c), at = r * ld + c;
      z_row<kColumns>(x, residual, at, c, n, p, z);
      activate(code, z, n);
      for (int64_t i = 0; i < n; ++i) y[at + i] = static_cast<T>(z[i]);
    }
}

// Calls f(first column, columns, offset, dz) for pieces of rows, where dz(i) = dy act'(z) of the piece's i-th element.
template <bool kColumns, bool kResidual, bool kLinear, typename T, typename F>
FASTGEN_BODY void for_dz(const T* x, const T* residual, const T* dy, int64_t rows, int64_t cols, int64_t ld,
                         const Params<Wide<T>>& p, int code, const F& f) {
  using W = Wide<T>;
  [[maybe_unused]] const W slope = code == kNone ? W(1) : code == kRelu ? W(0) : W(kNegativeSlope);
  alignas(64) W z[kLinear ? 1 : kBuffer];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += kBuffer) {
      const int64_t n = std::min(kBuffer, cols - c), at = r * ld + c;
      if constexpr (kLinear) {
        f(c, n, at, [&](int64_t i) __attribute__((always_inline)) {
          const W grad = z_at<kColumns, kResidual>(x, residual, at + i, c + i, p) > W(0) ? W(1) : slope;
          return grad * static_cast<W>(dy[at + i]);
        });
      } else {
        z_row<kColumns>(x, residual, at, c, n, p, z);
        activate_grad(code, z, n);
        for (int64_t i = 0; i < n; ++i) z[i] *= static_cast<W>(dy[at + i]);
        f(c, n, at, [&](int64_t i) __attribute__((always_inline)) { return z[i]; });
      }
    }
}

template <bool kColumns, bool kResidual, bool kLinear, typename T>
FASTGEN_BODY void sums_tile(const T* __restrict x, const T* __restrict residual, const T* __restrict dy,
                            T* __restrict dz_out, int64_t rows, int64_t cols, int64_t ld, Params<Wide<T>> p,
                            int code, Wide<T>* __restrict s1, Wide<T>* __restrict s2) {
  using W = Wide<T>;
  constexpr int64_t kLength = kColumns ? kCols : kLanes;
  const bool kept = kLinear ? kResidual : dz_out != nullptr;
  alignas(64) W part1[kLength] = {}, part2[kLength] = {}, sum1[kLength] = {}, sum2[kLength] = {};
  for_groups<kColumns>(rows, [&](int64_t r0, int64_t nr) __attribute__((always_inline)) {
    const auto add = [&](int64_t c, int64_t n, int64_t at, const auto& dz_at) __attribute__((always_inline)) {
      at += r0 * ld;
      for (int64_t j = 0; j < n; j += kLength) {
        const int64_t m = std::min(kLength, n - j);
        for (int64_t l = 0; l < m; ++l) {
          const W d = static_cast<W>(x[at + j + l]) - param<kColumns>(p.mean, c + j + l), dz = dz_at(j + l);
          part1[l] += dz;
          part2[l] += dz * d;
          if (kept) dz_out[at + j + l] = static_cast<T>(dz);
        }
      }
    };
    const T* added = residual != nullptr ? residual + r0 * ld : nullptr;
    for_dz<kColumns, kResidual, kLinear>(x + r0 * ld, added, dy + r0 * ld, nr, cols, ld, p, code, add);
    put_aside(part1, sum1, kColumns ? cols : kLanes);
    put_aside(part2, sum2, kColumns ? cols : kLanes);
  });
  if constexpr (kColumns)
    std::copy_n(sum1, cols, s1), std::copy_n(sum2, cols, s2);
  else
    *s1 = fold_lanes(sum1, kLanes), *s2 = fold_lanes(sum2, kLanes);
}

// s1 = sum dz, s2 = sum dz (x - mean), of each column or of the whole tile. dz_out = dz, unless null: it is the
// residual's gradient, and where dz is dear (not linear) it saves the second pass an activation.
template <bool kColumns, typename T>
FASTGEN_BODY void sums_body(const T* x, const T* residual, const T* dy, T* dz_out, int64_t rows, int64_t cols,
                            int64_t ld, Params<Wide<T>> p, int code, Wide<T>* s1, Wide<T>* s2) {
  if (!is_linear(code))
    sums_tile<kColumns, false, false>(x, residual, dy, dz_out, rows, cols, ld, p, code, s1, s2);
  else if (residual != nullptr)
    sums_tile<kColumns, true, true>(x, residual, dy, dz_out, rows, cols, ld, p, code, s1, s2);
  else
    sums_tile<kColumns, false, true>(x, residual, dy, dz_out, rows, cols, ld, p, code, s1, s2);
}

template <bool kColumns, bool kInPlace, bool kCentred, typename T>
FASTGEN_BODY void dx_tile(const T* __restrict x, const T* __restrict dy, T* __restrict dx, int64_t rows, int64_t cols,
                          int64_t ld, Params<Wide<T>> p, const Wide<T>* __restrict k1, const Wide<T>* __restrict k2,
                          int code) {
  using W = Wide<T>;
  const auto write = [&](int64_t c, int64_t n, int64_t at, const auto& dz) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      W value = param<kColumns>(p.a, c + i) * dz(i);
      const W d = static_cast<W>(x[at + i]) - param<kColumns>(p.mean, c + i);
      if (kCentred) value = value - param<kColumns>(k1, c + i) - d * param<kColumns>(k2, c + i);
      dx[at + i] = static_cast<T>(value);
    }
  };
  if constexpr (kInPlace)
    for (int64_t r = 0; r < rows; ++r)
      write(0, cols, r * ld, [&](int64_t i) __attribute__((always_inline)) { return static_cast<W>(dx[r * ld + i]); });
  else
    for_dz<kColumns, false, true>(x, static_cast<const T*>(nullptr), dy, rows, cols, ld, p, code, write);
}

// dx = a dz - k1 - (x - mean) k2, or without the means (k1 null): dx = a dz. See pool_sums. code: of an activation
// that is linear; dy null: dz stands in dx
template <bool kColumns, typename T>
FASTGEN_BODY void dx_body(const T* x, const T* dy, T* dx, int64_t rows, int64_t cols, int64_t ld, Params<Wide<T>> p,
                          const Wide<T>* k1, const Wide<T>* k2, int code) {
  if (dy == nullptr && k1 != nullptr)
    dx_tile<kColumns, true, true>(x, dy, dx, rows, cols, ld, p, k1, k2, code);
  else if (dy == nullptr)
    dx_tile<kColumns, true, false>(x, dy, dx, rows, cols, ld, p, k1, k2, code);
  else if (k1 != nullptr)
    dx_tile<kColumns, false, true>(x, dy, dx, rows, cols, ld, p, k1, k2, code);
  else
    dx_tile<kColumns, false, false>(x, dy, dx, rows, cols, ld, p, k1, k2, code);
}

// rows by cols elements, the first at offset, of one channel (channels last: from that column on). Its results stand
// from slot on.
struct Tile {
  int64_t channel, rows, cols, offset, slot;
};

// How x [N, C, *] lies in memory and is cut into tiles.
struct Geometry {
  int64_t n, c, s;            // s: the product of the spatial sizes
  bool columns;               // channels last
  int64_t repeat, width;      // pixels in a row of the matrix, so that few channels fill it; its columns: C repeat
  int64_t rows, cols, ld;     // of a tile
  int64_t pieces, parts;      // tiles along a plane (contiguous); tiles of a channel
  bool whole;                 // a thread does all of a channel at once

  explicit Geometry(const Tensor& x) : n(x.size(0)), c(x.size(1)) {
    s = x.numel() / (n * c);
    columns = !x.is_contiguous() || s == 1;
    repeat = 1;
    while (columns && 2 * repeat * c <= kLanes && n * s % (2 * repeat) == 0) repeat *= 2;
    width = c * repeat;
    rows = columns ? kRows : std::clamp<int64_t>(kTile / s, 1, n);
    cols = columns ? std::min(kCols, width) : std::min(kTile, s);
    ld = columns ? width : c * s;
    pieces = columns ? 1 : (s + cols - 1) / cols;
    parts = columns ? (n * s / repeat + rows - 1) / rows : (n + rows - 1) / rows * pieces;
    whole = !columns && c >= kManyChannels && n * s * static_cast<int64_t>(x.element_size()) <= kCached;
  }
  int64_t slots() const { return width * parts; }
  int64_t slot(int64_t part, int64_t column) const { return columns ? part * width + column : column * parts + part; }
  Tile tile(int64_t part, int64_t channel) const {
    const int64_t row = part / pieces * rows, col = part % pieces * cols, last = columns ? n * s / repeat : n;
    return {channel, std::min(rows, last - row), columns ? std::min(cols, width - channel) : std::min(cols, s - col),
            columns ? row * ld + channel : row * ld + channel * s + col, slot(part, channel)};
  }
  // The elements that a slot of the part stands for.
  int64_t count(int64_t part) const {
    const Tile t = tile(part, 0);
    return columns ? t.rows : t.rows * t.cols;
  }
};

// Calls f(tile) for all tiles, in parallel; backwards, so that a second pass begins with what the first left in the
// cache.
template <typename F>
void for_tiles(const Geometry& g, bool backwards, const F& f) {
  const int64_t across = g.columns ? (g.width + g.cols - 1) / g.cols : g.c, grain = kGrain / (g.rows * g.cols) + 1;
  torch::stable::parallel_for(0, across * g.parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = backwards ? end - 1 - (i - begin) : i;
      f(g.columns ? g.tile(k / across, k % across * g.cols) : g.tile(k % g.parts, k / g.parts));
    }
  });
}

// first(tile) for every tile, pool(channels from, to) once their tiles are done, then second(tile) for every tile.
template <typename First, typename Pool, typename Second>
void two_passes(const Geometry& g, const First& first, const Pool& pool, const Second& second) {
  if (!g.whole) {
    for_tiles(g, false, first);
    torch::stable::parallel_for(0, g.c, kGrain / (g.parts + 1) + 1, pool);
    for_tiles(g, true, second);
    return;
  }
  torch::stable::parallel_for(0, g.c, kGrain / (g.n * g.s) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t part = 0; part < g.parts; ++part) first(g.tile(part, c));
      pool(c, c + 1);
      for (int64_t part = g.parts; part-- > 0;) second(g.tile(part, c));
    }
  });
}

constexpr int64_t kPool = 64;  // channels that are pooled side by side

// Calls f(first channel, channels) for blocks of [begin, end).
template <typename F>
void for_channels(int64_t begin, int64_t end, const F& f) {
  for (int64_t c = begin; c < end; c += kPool) f(c, std::min(kPool, end - c));
}

// Calls f(slot, channel - c0, elements that the slot stands for) for every slot of nc channels.
template <typename F>
void for_slots(const Geometry& g, int64_t c0, int64_t nc, const F& f) {
  for (int64_t part = 0; part < g.parts; ++part) {
    const double count = static_cast<double>(g.count(part));
    for (int64_t column = c0; column < g.width; column += g.c)
      for (int64_t i = 0; i < nc; ++i) f(g.slot(part, column + i), i, count);
  }
}

// Mean and variance of the channels from their tiles' means and centred sums of squares, in fp64.
template <typename W>
void pool_moments(const Geometry& g, const std::vector<W>& means, const std::vector<W>& m2s, int64_t c0, int64_t nc,
                  W* mean, W* var) {
  const double total = static_cast<double>(g.n * g.s);
  double average[kPool] = {}, squares[kPool] = {};
  for_slots(g, c0, nc, [&](int64_t slot, int64_t i, double count) { average[i] += count * means[slot]; });
  for (int64_t i = 0; i < nc; ++i) average[i] /= total;
  for_slots(g, c0, nc, [&](int64_t slot, int64_t i, double count) {
    const double delta = means[slot] - average[i];
    squares[i] += m2s[slot] + count * delta * delta;
  });
  for (int64_t i = 0; i < nc; ++i) {
    mean[c0 + i] = static_cast<W>(average[i]);
    var[c0 + i] = static_cast<W>(squares[i] / total);
  }
}

// What z needs of each column, from its channel's statistics and parameters.
template <typename W>
struct Affine {
  const Geometry& g;
  const W *weight, *bias, *mean, *var;
  double eps;
  std::vector<W> m, rstd, a, b;

  Affine(const Geometry& geometry, const OptTensor& w, const OptTensor& beta, const Tensor& mu, const Tensor& v,
         double e)
      : g(geometry), weight(in<W>(w)), bias(in<W>(beta)), mean(in<W>(mu)), var(in<W>(v)), eps(e), m(g.width),
        rstd(g.width), a(g.width), b(g.width) {}

  void fill(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t i = c; i < g.width; i += g.c) {
        m[i] = mean[c];
        rstd[i] = static_cast<W>(1.0 / std::sqrt(static_cast<double>(var[c]) + eps));
        a[i] = weight != nullptr ? weight[c] * rstd[i] : rstd[i];
        b[i] = bias != nullptr ? bias[c] : W(0);
      }
  }
  Params<W> at(int64_t column) const { return {&m[column], &a[column], &b[column]}; }
};

// x, residual, y: [N, C, *], all in one dense layout; weight, bias, mean, var: [C], fp32 (fp64 for fp64). training:
// mean and var are those of x, to be written; otherwise they are given.
void batch_norm_act_fwd(const Tensor& x, const OptTensor& residual, const OptTensor& weight, const OptTensor& bias,
                        bool training, double eps, int64_t act, const Tensor& y, const Tensor& mean,
                        const Tensor& var) {
  const Geometry g(x);
  const int code = static_cast<int>(act);
  for_dtype(x, "batch_norm_act", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const T *source = in<T>(x), *added = in<T>(residual);
    T* target = out<T>(y);
    Affine<W> affine(g, weight, bias, mean, var, eps);
    const auto apply = [&](const Tile& t) {
      const T* r = added != nullptr ? added + t.offset : nullptr;
      if (g.columns)
        multiversion<apply_body<true, T>>(source + t.offset, r, target + t.offset, t.rows, t.cols, g.ld,
                                          affine.at(t.channel), code);
      else
        multiversion<apply_body<false, T>>(source + t.offset, r, target + t.offset, t.rows, t.cols, g.ld,
                                           affine.at(t.channel), code);
    };
    if (!training) {
      affine.fill(0, g.c);
      for_tiles(g, false, apply);
      return;
    }
    std::vector<W> means(g.slots()), m2s(g.slots());
    const auto moments = [&](const Tile& t) {
      if (g.columns)
        multiversion<moments_body<true, T>>(source + t.offset, t.rows, t.cols, g.ld, &means[t.slot], &m2s[t.slot]);
      else
        multiversion<moments_body<false, T>>(source + t.offset, t.rows, t.cols, g.ld, &means[t.slot], &m2s[t.slot]);
    };
    const auto pool = [&](int64_t begin, int64_t end) {
      for_channels(begin, end, [&](int64_t c, int64_t nc) {
        pool_moments(g, means, m2s, c, nc, out<W>(mean), out<W>(var));
      });
      affine.fill(begin, end);
    };
    two_passes(g, moments, pool, apply);
  });
}

// dbias = sum dz and dweight = rstd sum dz (x - mean) of the channels, from their tiles, in fp64. Then, with M values
// a channel, dx = a (dz - mean(dz) - xhat mean(dz xhat)) is a dz - k1 - (x - mean) k2.
template <typename W>
void pool_sums(const Geometry& g, const Affine<W>& affine, const std::vector<W>& s1, const std::vector<W>& s2,
               int64_t c0, int64_t nc, W* dweight, W* dbias, std::vector<W>& k1, std::vector<W>& k2) {
  double one[kPool] = {}, two[kPool] = {};
  for_slots(g, c0, nc, [&](int64_t slot, int64_t i, double) {
    one[i] += s1[slot];
    two[i] += s2[slot];
  });
  const double m = static_cast<double>(g.n * g.s);
  for (int64_t i = 0; i < nc; ++i) {
    const double a = affine.a[c0 + i], rstd = affine.rstd[c0 + i];
    dbias[c0 + i] = static_cast<W>(one[i]);
    dweight[c0 + i] = static_cast<W>(two[i] * rstd);
    for (int64_t column = c0 + i; column < g.width; column += g.c) {
      k1[column] = static_cast<W>(a * one[i] / m);
      k2[column] = static_cast<W>(a * rstd * rstd * two[i] / m);
    }
  }
}

// dy, dx: [N, C, *]; dresidual likewise, where there is a residual; dweight, dbias: [C], fp32 (fp64 for fp64)
void batch_norm_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                        const OptTensor& bias, const Tensor& mean, const Tensor& var, bool training, double eps,
                        int64_t act, const Tensor& dx, const OptTensor& dresidual, const Tensor& dweight,
                        const Tensor& dbias) {
  const Geometry g(x);
  const int code = static_cast<int>(act);
  for_dtype(x, "batch_norm_act_bwd", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const T *source = in<T>(x), *added = in<T>(residual), *up = in<T>(dy);
    T *target = out<T>(dx), *dadded = out<T>(dresidual);
    Affine<W> affine(g, weight, bias, mean, var, eps);
    affine.fill(0, g.c);
    std::vector<W> s1(g.slots()), s2(g.slots()), k1(g.width), k2(g.width);
    // Where dz is kept between the passes, if it is: nothing is left of the activation then.
    T* kept = dadded != nullptr ? dadded : is_linear(code) ? nullptr : target;
    const int left = kept != nullptr ? static_cast<int>(kNone) : code;
    const auto write = [&](const Tile& t) {
      const T* given = kept == target ? nullptr : (kept != nullptr ? kept : up) + t.offset;
      const W *mean1 = training ? &k1[t.channel] : nullptr, *mean2 = &k2[t.channel];
      if (g.columns)
        multiversion<dx_body<true, T>>(source + t.offset, given, target + t.offset, t.rows, t.cols, g.ld,
                                       affine.at(t.channel), mean1, mean2, left);
      else
        multiversion<dx_body<false, T>>(source + t.offset, given, target + t.offset, t.rows, t.cols, g.ld,
                                        affine.at(t.channel), mean1, mean2, left);
    };
    const auto sums = [&](const Tile& t) {
      const T* r = added != nullptr ? added + t.offset : nullptr;
      T* dz = kept != nullptr ? kept + t.offset : nullptr;
      if (g.columns)
        multiversion<sums_body<true, T>>(source + t.offset, r, up + t.offset, dz, t.rows, t.cols, g.ld,
                                         affine.at(t.channel), code, &s1[t.slot], &s2[t.slot]);
      else
        multiversion<sums_body<false, T>>(source + t.offset, r, up + t.offset, dz, t.rows, t.cols, g.ld,
                                          affine.at(t.channel), code, &s1[t.slot], &s2[t.slot]);
      if (!training) write(t);
    };
    const auto pool = [&](int64_t begin, int64_t end) {
      for_channels(begin, end, [&](int64_t c, int64_t nc) {
        pool_sums(g, affine, s1, s2, c, nc, out<W>(dweight), out<W>(dbias), k1, k2);
      });
    };
    two_passes(g, sums, pool, [&](const Tile& t) {
      if (training) write(t);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "batch_norm_act_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool training, float eps, int act, "
      "Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var) -> ()");
  m.def(
      "batch_norm_act_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor var, bool training, float eps, int act, Tensor(a!) dx, Tensor(b!)? dresidual, Tensor(c!) dweight, "
      "Tensor(d!) dbias) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("batch_norm_act_fwd", TORCH_BOX(&fastgen::batch_norm_act_fwd));
  m.impl("batch_norm_act_bwd", TORCH_BOX(&fastgen::batch_norm_act_bwd));
}
