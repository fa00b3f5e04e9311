// bias_act: y = g(x + b), its gradient and that one's gradient; see fastgen/ops/bias_act.py.
//
// Memory is walked in tiles of at most kPiece elements side by side. The bias of a tile is one number where a channel's
// elements lie together in long runs (contiguous maps); elsewhere it is a row of numbers, repeated until it is long
// enough to be worth a loop, which all rows of the tile share. Sums over a channel are in fp64: each tile has a slot of
// its own, and slots are added up in order, so the result does not depend on the number of threads.
// There is no noise here, so a multiplication and an addition may become one fused instruction.
#pragma GCC optimize("fp-contract=fast")

#include "../common/bias_act.h"

#include <vector>

#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kPiece = 1024;      // elements side by side: their buffers stay in L1
constexpr int64_t kElements = 16384;  // in a tile of several rows
constexpr int64_t kShort = 64;        // a run of one channel's elements that is too short for a loop of its own

// How the elements [outer, channels, step] are cut into tiles.
struct Geometry {
  int64_t numel, channels, step;
  bool table;             // the bias is a row of numbers
  int64_t width, rows;    // a row: one run of a channel, or several times all channels
  int64_t pieces, height, bands;  // tiles along a row; rows of a tile; tiles along a column

  Geometry(const Tensor& x, const OptTensor& b, int64_t step_of) : numel(x.numel()), channels(b ? b->numel() : 1) {
    step = step_of;
    table = step < kShort && channels > 1;
    const int64_t period = channels * step;
    width = table ? period * std::max<int64_t>(1, kPiece / period) : step;
    rows = (numel + width - 1) / width;
    pieces = (width + kPiece - 1) / kPiece;
    height = table ? std::max<int64_t>(1, kElements / std::min(width, kPiece)) : 1;
    bands = (rows + height - 1) / height;
  }
  int64_t channel(int64_t row, int64_t column) const { return table ? column / step % channels : row % channels; }
};

// What is added to each element of a row (table) or to all of a row; zeros where there is nothing to add.
template <typename W>
std::vector<W> addends(const Geometry& g, const OptTensor& b) {
  std::vector<W> out(g.table ? g.width : g.channels, W(0));
  if (b)
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = in<W>(*b)[g.table ? g.channel(0, static_cast<int64_t>(i)) : static_cast<int64_t>(i)];
  return out;
}

template <typename W>
struct Setting {
  int code;
  W alpha, gain, clamp;
};

// z becomes g(z), or g'(z), or g'(z) with g''(z) in more. z, more: [n]
template <int kOrder>
struct Evaluate {
  template <int kAct, typename W>
  FASTGEN_BODY void loop(W* __restrict z, W* __restrict more, const Setting<W>& s, int64_t n) {
    const W alpha = s.alpha, gain = s.gain, clamp = s.clamp;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const W at = z[i];
      z[i] = kOrder == 0 ? bias_act::g<kAct>(at, alpha, gain, clamp) : bias_act::g_first<kAct>(at, alpha, gain, clamp);
      if constexpr (kOrder == 2) more[i] = bias_act::g_second<kAct>(at, alpha, gain, clamp);
    }
  }
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(W* z, W* more, Setting<W> s, int64_t n) {
    switch (s.code) {
      case bias_act::kRelu: return loop<bias_act::kRelu>(z, more, s, n);
      case bias_act::kLrelu: return loop<bias_act::kLrelu>(z, more, s, n);
      case bias_act::kTanh: return loop<bias_act::kTanh>(z, more, s, n);
      case bias_act::kSigmoid: return loop<bias_act::kSigmoid>(z, more, s, n);
      case bias_act::kElu: return loop<bias_act::kElu>(z, more, s, n);
      case bias_act::kSelu: return loop<bias_act::kSelu>(z, more, s, n);
      case bias_act::kSoftplus: return loop<bias_act::kSoftplus>(z, more, s, n);
      case bias_act::kSwish: return loop<bias_act::kSwish>(z, more, s, n);
      default: return loop<bias_act::kLinear>(z, more, s, n);
    }
  }
};

// z = x + b; x, z: [n]; b: [n] (table) or [1]
template <typename T>
FASTGEN_BODY void add_body(const T* x, const Wide<T>* b, bool table, Wide<T>* z, int64_t n) {
  using W = Wide<T>;
  if (table) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = static_cast<W>(x[i]) + b[i];
  } else {
    const W added = *b;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = static_cast<W>(x[i]) + added;
  }
}
template <typename T>
FASTGEN_BODY void narrow_body(const Wide<T>* z, T* y, int64_t n) {
  scatter(z, n, 1, y);
}

// a = t f and, unless b is null, b = t dy s, with the sums of a (or b) if there are any. t, dy, a, b: [n] in memory; t
// is dy itself in the first derivative; f, s: g' and g''; sums: [n] or null
template <typename T>
FASTGEN_BODY void product_body(const T* __restrict t, const Wide<T>* __restrict f, T* __restrict a,
                               double* __restrict sums, int64_t n) {
  using W = Wide<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = static_cast<T>(static_cast<W>(t[i]) * f[i]);
  if (sums == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(static_cast<W>(t[i]) * f[i]);
}
template <typename T>
FASTGEN_BODY void products_body(const Wide<T>* __restrict t, const T* __restrict dy, const Wide<T>* __restrict f,
                                const Wide<T>* __restrict s, T* __restrict a, T* __restrict b,
                                double* __restrict sums, int64_t n) {
  using W = Wide<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = static_cast<T>(t[i] * f[i]);
  if (b == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) b[i] = static_cast<T>(t[i] * static_cast<W>(dy[i]) * s[i]);
  if (sums == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(t[i] * static_cast<W>(dy[i]) * s[i]);
}

// The sum of n numbers, which are used up.
FASTGEN_BODY double total_body(double* sums, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += sums[i];
  return total;
}

// Calls f(offset, n, row or column of the addends, sums or null) for each piece of the elements, in parallel, and puts
// the channels' sums into out [channels], if given, which f adds to.
template <typename W, typename F>
void for_pieces(const Geometry& g, const OptTensor& out_sums, const F& f) {
  const bool summed = out_sums.has_value();
  std::vector<double> slots(summed ? g.bands * (g.table ? g.width : g.pieces) : 0);
  const int64_t grain = std::max<int64_t>(1, 2 * kElements / (g.height * std::min(g.width, kPiece)));
  torch::stable::parallel_for(0, g.bands * g.pieces, grain, [&](int64_t begin, int64_t end) {
    alignas(64) double sums[kPiece];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t band = i / g.pieces, column = i % g.pieces * kPiece, most = std::min(kPiece, g.width - column);
      if (summed) std::fill_n(sums, most, 0.0);
      for (int64_t row = band * g.height; row < std::min(g.rows, (band + 1) * g.height); ++row) {
        const int64_t at = row * g.width + column, n = std::min(most, g.numel - at);
        if (n > 0) f(at, n, g.table ? column : row % g.channels, summed ? sums : nullptr);
      }
      if (!summed) continue;
      if (g.table)
        std::copy_n(sums, most, slots.data() + band * g.width + column);
      else
        slots[i] = multiversion<total_body>(sums, most);
    }
  });
  if (!summed) return;
  std::vector<double> totals(g.channels, 0.0);
  for (int64_t band = 0; band < g.bands; ++band)
    for (int64_t j = 0; j < (g.table ? g.width : g.pieces); ++j)
      totals[g.channel(band, j)] += slots[band * (g.table ? g.width : g.pieces) + j];
  for (int64_t c = 0; c < g.channels; ++c) out<W>(*out_sums)[c] = static_cast<W>(totals[c]);
}

// The element at memory offset o has the channel o / step % C. x, y: dense, of one layout; b: [C] in fp32 (fp64 for
// fp64) or none; clamp: infinity for none
void bias_act_fwd(const Tensor& x, const OptTensor& b, int64_t step, int64_t act, double alpha, double gain,
                  double clamp, const Tensor& y) {
  for_dtype(x, "bias_act", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const Geometry g(x, b, step);
    const std::vector<W> bias = addends<W>(g, b);
    const Setting<W> s{static_cast<int>(act), static_cast<W>(alpha), static_cast<W>(gain), static_cast<W>(clamp)};
    for_pieces<W>(g, std::nullopt, [&](int64_t at, int64_t n, int64_t which, double*) {
      alignas(64) W buffer[kPiece];
      T* result = out<T>(y) + at;
      W* z = target(result, 1, buffer);
      multiversion<add_body<T>>(in<T>(x) + at, bias.data() + which, g.table, z, n);
      multiversion<Evaluate<0>>(z, static_cast<W*>(nullptr), s, n);
      multiversion<narrow_body<T>>(z, result, n);
    });
  });
}

// dx = dy g'(x + b); db [C], if given: its sums. The rest as above.
void bias_act_bwd(const Tensor& dy, const Tensor& x, const OptTensor& b, int64_t step, int64_t act, double alpha,
                  double gain, double clamp, const Tensor& dx, const OptTensor& db) {
  for_dtype(x, "bias_act", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const Geometry g(x, b, step);
    const std::vector<W> bias = addends<W>(g, b);
    const Setting<W> s{static_cast<int>(act), static_cast<W>(alpha), static_cast<W>(gain), static_cast<W>(clamp)};
    for_pieces<W>(g, db, [&](int64_t at, int64_t n, int64_t which, double* sums) {
      alignas(64) W z[kPiece];
      multiversion<add_body<T>>(in<T>(x) + at, bias.data() + which, g.table, z, n);
      multiversion<Evaluate<1>>(z, static_cast<W*>(nullptr), s, n);
      multiversion<product_body<T>>(in<T>(dy) + at, z, out<T>(dx) + at, sums, n);
    });
  });
}

// With t = ddx + ddb: d_dy = t g'(x + b) and, if given, d_x = t dy g''(x + b) and its sums d_b [C]. ddb: [C] or none
void bias_act_bwd_bwd(const Tensor& ddx, const OptTensor& ddb, const Tensor& dy, const Tensor& x, const OptTensor& b,
                      int64_t step, int64_t act, double alpha, double gain, double clamp, const Tensor& d_dy,
                      const OptTensor& d_x, const OptTensor& d_b) {
  for_dtype(x, "bias_act", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const Geometry g(x, b, step);
    const std::vector<W> bias = addends<W>(g, b), more = addends<W>(g, ddb);
    const Setting<W> s{static_cast<int>(act), static_cast<W>(alpha), static_cast<W>(gain), static_cast<W>(clamp)};
    for_pieces<W>(g, d_b, [&](int64_t at, int64_t n, int64_t which, double* sums) {
      alignas(64) W z[kPiece], second[kPiece], t[kPiece];
      multiversion<add_body<T>>(in<T>(x) + at, bias.data() + which, g.table, z, n);
      if (d_x)
        multiversion<Evaluate<2>>(z, second, s, n);
      else
        multiversion<Evaluate<1>>(z, second, s, n);
      multiversion<add_body<T>>(in<T>(ddx) + at, more.data() + which, g.table, t, n);
      multiversion<products_body<T>>(t, in<T>(dy) + at, z, second, out<T>(d_dy) + at,
                                     fastgen::at(out<T>(d_x), at), sums, n);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "bias_act_fwd(Tensor x, Tensor? b, int step, int act, float alpha, float gain, float clamp, Tensor(a!) y) -> ()");
  m.def(
      "bias_act_bwd(Tensor dy, Tensor x, Tensor? b, int step, int act, float alpha, float gain, float clamp, "
      "Tensor(a!) dx, Tensor(b!)? db) -> ()");
  m.def(
      "bias_act_bwd_bwd(Tensor ddx, Tensor? ddb, Tensor dy, Tensor x, Tensor? b, int step, int act, float alpha, "
      "float gain, float clamp, Tensor(a!) d_dy, Tensor(b!)? d_x, Tensor(c!)? d_b) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("bias_act_fwd", TORCH_BOX(&fastgen::bias_act_fwd));
  m.impl("bias_act_bwd", TORCH_BOX(&fastgen::bias_act_bwd));
  m.impl("bias_act_bwd_bwd", TORCH_BOX(&fastgen::bias_act_bwd_bwd));
}
