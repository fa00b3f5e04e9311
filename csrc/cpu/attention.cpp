// attention: softmax(q kᵀ scale) v, forward and backward; see fastgen/ops/attention.py.
//
// A block of queries meets one block of keys after the other (Dao et al. 2022, "FlashAttention"), so no L x S matrix
// is ever stored. Keys are packed once a head with the lanes of a vector along the keys; probabilities then come out
// with lanes along the keys, and their product with v has its lanes along D. Scores are in units of ln 2, so that exp2
// makes them probabilities. Backward makes the probabilities again from the sums that forward left.
// Tasks are blocks of one head and sums go in one order, so results depend neither on the threads nor on the batch.
// The build forbids contraction for the sake of the noise, of which there is none here.
#pragma GCC optimize("fp-contract=fast")
// Vectors wider than the base instruction set has are handed to inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kRows = 48;      // queries in a block
constexpr int64_t kKeys = 128;     // keys in a block
constexpr int64_t kMaxLanes = 16;  // of the widest vector: what scratch memory is laid out for
constexpr double kLog2e = 1.4426950408889634;
// Where |q| |k| is at most kBound, in units of ln 2, no maximum has to be taken off the scores: their exp2 lies in
// [2^-30, 2^30], and sums of its products with v stay finite as long as |v| is at most kLargest.
constexpr double kBound = 30, kLargest = 1e24;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// [N, h, L, D] in memory, the last dimension dense: the strides of the others.
template <typename T>
struct View {
  T* data;
  int64_t n, h, l;
};

struct Shape {
  int64_t heads, l, s, d;
  double scale;
  int64_t h;
  bool causal;

  // Packed queries are q sign(), so that their products with keys times factor() are scores in units of ln 2, of which
  // the largest product makes the largest.
  double sign() const { return scale > 0 ? 1 : scale < 0 ? -1 : 0; }
  double factor() const { return scale == 0 ? 1 : std::abs(scale) * kLog2e; }
  int64_t blocks() const { return (l + kRows - 1) / kRows; }
  // The keys that queries up to the last of a block see.
  int64_t keys(int64_t end) const { return causal ? std::min(s, end) : s; }
};

template <typename T>
FASTGEN_BODY T* head_of(const View<T>& x, const Shape& g, int64_t head) {
  return x.data + head / g.h * x.n + head % g.h * x.h;
}

template <typename W, int kBytes>
struct Simd {
  using Int = std::conditional_t<sizeof(W) == 8, int64_t, int32_t>;
  static constexpr int kLanes = kBytes / sizeof(W), kPanel = 2 * kLanes;
  typedef W Vec __attribute__((vector_size(kBytes)));
  typedef Int Index __attribute__((vector_size(kBytes)));
  typedef W Loose __attribute__((vector_size(kBytes), aligned(sizeof(W)), may_alias));

  FASTGEN_BODY Vec load(const W* p) { return *reinterpret_cast<const Loose*>(p); }
  FASTGEN_BODY void store(W* p, const Vec& x) { *reinterpret_cast<Loose*>(p) = x; }
  // D in whole vectors, and the distance of packed rows: no power of two that would put them all into one cache set.
  static int64_t width(int64_t d) { return round_up(d, kLanes); }
  static int64_t ld(int64_t d) { return width(d) % 64 == 0 ? width(d) + 16 : width(d); }

  // 2^(x factor - shift). kShifted: for any value up to 128, with 0 for -inf and NaN for NaN; else without a shift,
  // for values in [-126, 127]. The product is not rounded by itself: large scores lose nothing.
  template <bool kShifted>
  FASTGEN_BODY Vec exp2(const Vec& given, W factor, W shift = 0) {
    Vec x = given;
    if constexpr (kShifted) x = x * factor - shift;
    const W left = kShifted ? W(1) : factor;
    if constexpr (sizeof(W) == 8) {
      for (int i = 0; i < kLanes; ++i) x[i] = std::exp2(x[i] * left);
      return x;
    } else {
      const Vec least = Vec{} - 127.0f;
      if constexpr (kShifted) x = x < least ? least : x;
      const Vec shifted = x * left + (12582912.0f + 127.0f);  // 1.5 2^23 rounds to an integer, n, plus exponent's bias
      const Vec r = x * left - (shifted - (12582912.0f + 127.0f));
      Vec p = r * 1.3264727e-3f + 9.6715126e-3f;  // minimax, 9e-8 of the value
      p = p * r + 5.5507337e-2f;
      p = p * r + 2.4022242e-1f;
      p = p * r + 6.9314698e-1f;
      p = p * r + 1.0f;
      return p * (Vec)((Index)shifted << 23);  // n = -127 makes 0
    }
  }

  FASTGEN_BODY Index first(int64_t n) {  // which lanes are below n
    Index lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < static_cast<Int>(std::clamp<int64_t>(n, 0, kLanes));
  }
  FASTGEN_BODY W sum(const Vec& x) {
    W part[kLanes];
    store(part, x);
    for (int n = kLanes / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    return part[0];
  }
  FASTGEN_BODY W max(const Vec& x) {
    W part[kLanes];
    store(part, x);
    for (int n = kLanes / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
    return part[0];
  }

  // acc[m][n] += sum over k of a[m am + k ak] b[k ldb + n lanes]: the registers' share of every product below.
  template <int kM, int kN>
  FASTGEN_BODY void product(Vec (&acc)[kM][kN], const W* a, int64_t am, int64_t ak, const W* b, int64_t ldb,
                            int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      Vec right[kN];
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) right[n] = load(b + k * ldb + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const W left = a[m * am + k * ak];
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) acc[m][n] += right[n] * left;
      }
    }
  }

  template <int kM, int kN>
  FASTGEN_BODY void add_tile(const W* a, int64_t am, int64_t ak, const W* b, int64_t ldb, int64_t count, W* c,
                             int64_t ldc) {
    Vec acc[kM][kN];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) acc[m][n] = load(c + m * ldc + n * kLanes);
    product<kM, kN>(acc, a, am, ak, b, ldb, count);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) store(c + m * ldc + n * kLanes, acc[m][n]);
  }

  // c [rows, width] += a b, with a's element (m, k) at m am + k ak. rows: a multiple of 4.
  FASTGEN_BODY void add_product(int64_t rows, int64_t width, const W* a, int64_t am, int64_t ak, const W* b,
                                int64_t ldb, int64_t count, W* c, int64_t ldc) {
    int64_t n = 0;
    for (; n + kPanel <= width; n += kPanel) {
      int64_t m = 0;
      for (; m + 6 <= rows; m += 6) add_tile<6, 2>(a + m * am, am, ak, b + n, ldb, count, c + m * ldc + n, ldc);
      for (; m < rows; m += 2) add_tile<2, 2>(a + m * am, am, ak, b + n, ldb, count, c + m * ldc + n, ldc);
    }
    if (n < width) {
      int64_t m = 0;
      for (; m + 12 <= rows; m += 12) add_tile<12, 1>(a + m * am, am, ak, b + n, ldb, count, c + m * ldc + n, ldc);
      for (; m < rows; m += 4) add_tile<4, 1>(a + m * am, am, ak, b + n, ldb, count, c + m * ldc + n, ldc);
    }
  }
};

// y [n] = x [n] times a factor, from or to W.
template <typename X, typename W, typename From, typename To>
FASTGEN_BODY void convert(const From* x, int64_t n, W factor, To* y) {
  int64_t i = 0;
  if constexpr (std::is_same_v<From, To>)
    for (; i + X::kLanes <= n; i += X::kLanes) X::store(y + i, X::load(x + i) * factor);
  for (; i < n; ++i) y[i] = static_cast<To>(static_cast<W>(x[i]) * factor);
}

// rows [padded, ld] of x [n, d], times a factor; zeros behind d and in the rows from n on.
template <typename X, typename W, typename T>
FASTGEN_BODY void pack_rows(const T* x, int64_t stride, int64_t n, int64_t padded, int64_t d, int64_t ld, W factor,
                            W* rows) {
  for (int64_t i = 0; i < padded; ++i, rows += ld) {
    const int64_t filled = i < n ? d : 0;
    convert<X>(x + i * stride, filled, factor, rows);
    for (int64_t c = filled; c < ld; ++c) rows[c] = 0;
  }
}

// panels [n / width, d, width] of x [n, d]: each row's elements a panel's width apart; zeros behind n.
template <typename X, typename W, typename T>
FASTGEN_BODY void pack_panels(const T* x, int64_t stride, int64_t n, int64_t d, W* panels) {
  for (int64_t first = 0; first < n; first += X::kPanel, panels += d * X::kPanel) {
    const int64_t filled = std::min<int64_t>(X::kPanel, n - first);
    if (filled < X::kPanel) std::fill_n(panels, d * X::kPanel, W(0));
    for (int64_t i = 0; i < filled; ++i)
      for (int64_t c = 0; c < d; ++c) panels[c * X::kPanel + i] = static_cast<W>(x[(first + i) * stride + c]);
  }
}

// y [n, d] = rows [n, ld] times a factor.
template <typename X, typename W, typename T>
FASTGEN_BODY void unpack(const W* rows, int64_t ld, int64_t n, int64_t d, W factor, T* y, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) convert<X>(rows + i * ld, d, factor, y + i * stride);
}

// The largest sum of squares over `terms` vectors `step` apart, of each lane of a group by itself; groups are `size`
// apart. Of packed keys that is |k|²; of rows, with one term, an element's square. NaN may get lost: it finds its own
// way through the sums, with or without a shift.
template <typename X, typename W>
FASTGEN_BODY W largest_square(const W* x, int64_t groups, int64_t size, int64_t terms, int64_t step) {
  typename X::Vec largest = {};
  for (int64_t g = 0; g < groups; ++g) {
    typename X::Vec square = {};
    for (int64_t t = 0; t < terms; ++t) {
      const typename X::Vec value = X::load(x + g * size + t * step);
      square += value * value;
    }
    largest = square <= largest ? largest : square;
  }
  W result = 0;
  for (int i = 0; i < X::kLanes; ++i) result = largest[i] <= result ? result : largest[i];
  return result;
}

template <typename T>
struct ForwardArgs {
  Shape g;
  View<const T> q, k, v;
  View<T> out;
  Wide<T>* sums;  // [2, N, h, L]
};

struct Forward {
  static int64_t scratch(const Shape& g) {
    const int64_t keys = round_up(g.s, 2 * kMaxLanes), ld = round_up(g.d, kMaxLanes) + 16;
    return keys * (g.d + ld) + kRows * (2 * ld + kKeys + 2 * kMaxLanes + 1) + 64;
  }

  template <Isa kIsa, typename T>
  FASTGEN_BODY void run(const ForwardArgs<T>* args, Wide<T>* memory, int64_t begin, int64_t end) {
    using W = Wide<T>;
    using X = Simd<W, vector_bytes(kIsa)>;
    const Shape& g = args->g;
    const int64_t ld = X::ld(g.d), keys = round_up(g.s, X::kPanel);
    W* const panels = memory;
    W* const values = panels + keys * g.d;
    Block<X, W> b{g, ld, static_cast<W>(g.factor()), panels, values};
    b.queries = values + keys * ld;
    b.sums = b.queries + kRows * ld;
    b.scores = b.sums + kRows * ld;
    b.total = b.scores + kRows * kKeys;
    b.largest = b.total + kRows * X::kLanes;
    b.shift = b.largest + kRows * X::kLanes;
    int64_t packed = -1;
    W key_square = 0, value_square = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / g.blocks(), first = task % g.blocks() * kRows;
      if (head != packed) {
        const T *k = head_of(args->k, g, head), *v = head_of(args->v, g, head);
        pack_panels<X>(k, args->k.l, g.s, g.d, panels);
        key_square = 0;
        for (int half = 0; half < 2; ++half) {
          const W square =
              largest_square<X>(panels + half * X::kLanes, keys / X::kPanel, g.d * X::kPanel, g.d, X::kPanel);
          key_square = square <= key_square ? key_square : square;
        }
        pack_rows<X>(v, args->v.l, g.s, g.s, g.d, ld, W(1), values);
        value_square = largest_square<X>(values, g.s * ld / X::kLanes, X::kLanes, 1, 0);
        packed = head;
      }
      const int64_t rows = std::min(kRows, g.l - first);
      b.first = first, b.rows = round_up(rows, 4);
      pack_rows<X>(head_of(args->q, g, head) + first * args->q.l, args->q.l, rows, b.rows, g.d, ld,
                static_cast<W>(g.sign()), b.queries);
      W row_square = 0;
      for (int64_t i = 0; i < rows; ++i) {
        typename X::Vec square = {};
        for (int64_t c = 0; c < ld; c += X::kLanes) {
          const typename X::Vec value = X::load(b.queries + i * ld + c);
          square += value * value;
        }
        const W sum = X::sum(square);
        row_square = sum <= row_square ? row_square : sum;
      }
      const W bound = std::sqrt(row_square) * std::sqrt(key_square) * b.factor;
      // Among few keys one may have all the weight, and a shift by its score makes its p 1, exactly.
      if (bound <= W(kBound) && value_square <= W(kLargest) && g.s >= kMaxLanes && !g.causal)
        Block<X, W>::template attend<true>(b);
      else
        Block<X, W>::template attend<false>(b);
      for (int64_t i = 0; i < rows; ++i) {
        const W total = X::sum(X::load(b.total + i * X::kLanes)), inverse = W(1) / total;
        T* const row = head_of(args->out, g, head) + (first + i) * args->out.l;
        convert<X>(b.sums + i * ld, g.d, inverse, row);
        args->sums[head * g.l + first + i] = b.shift[i];
        args->sums[(g.heads + head) * g.l + first + i] = total;
      }
    }
  }

  // One block of queries and what becomes of it.
  template <typename X, typename W>
  struct Block {
    using Vec = typename X::Vec;
    static constexpr W kInf = std::numeric_limits<W>::infinity();
    const Shape& g;
    int64_t ld;
    W factor;
    const W *panels, *values;  // packed keys, and v: [S, ld]
    W *queries, *sums;         // [rows, ld]: q, and the sum of p v
    W* scores;                 // [rows, kKeys]: products of q and k, then p
    W *total, *largest;        // [rows, lanes]: the sum of p, and this block's largest product
    W* shift;                  // [rows]: what is taken off the scores, as p would overflow without
    int64_t first, rows;

    // kBounded: no score can overflow, and nothing is taken off.
    template <bool kBounded>
    FASTGEN_BODY void attend(Block& b) {
      std::fill_n(b.sums, b.rows * b.ld, W(0));
      std::fill_n(b.total, b.rows * X::kLanes, W(0));
      std::fill_n(b.shift, b.rows, kBounded ? W(0) : -kInf);
      const int64_t keys = b.g.keys(b.first + b.rows);
      for (int64_t key = 0; key < keys; key += kKeys) {
        const int64_t count = std::min(kKeys, keys - key);
        if constexpr (!kBounded) std::fill_n(b.largest, b.rows * X::kLanes, -kInf);
        for (int64_t j = 0; j < count; j += X::kPanel) {
          int64_t i = 0;
          for (; i + 6 <= b.rows; i += 6) tile<6, kBounded>(b, i, key, j);
          for (; i < b.rows; i += 2) tile<2, kBounded>(b, i, key, j);
        }
        if constexpr (!kBounded) exponentials(b, round_up(count, X::kPanel));
        X::add_product(b.rows, X::width(b.g.d), b.scores, kKeys, 1, b.values + key * b.ld, b.ld, count, b.sums, b.ld);
      }
    }

    // kM queries against a panel of keys.
    template <int kM, bool kBounded>
    FASTGEN_BODY void tile(Block& b, int64_t i, int64_t key, int64_t j) {
      Vec acc[kM][2] = {};
      X::template product<kM, 2>(acc, b.queries + i * b.ld, b.ld, 1, b.panels + (key + j) * b.g.d, X::kPanel, b.g.d);
      const int64_t seen = b.g.keys(b.first + i + 1) - key - j;  // by the first of these queries
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          Vec x = acc[m][n];
          if constexpr (kBounded) x = X::template exp2<false>(x, b.factor);
          if (__builtin_expect(seen < X::kPanel, 0)) {
            const int64_t limit = b.g.keys(b.first + i + m + 1) - key - j - n * X::kLanes;
            x = X::first(limit) ? x : Vec{} + (kBounded ? W(0) : -kInf);
          }
          X::store(b.scores + (i + m) * kKeys + j + n * X::kLanes, x);
          W* const kept = (kBounded ? b.total : b.largest) + (i + m) * X::kLanes;
          const Vec before = X::load(kept);
          X::store(kept, kBounded ? before + x : (x > before ? x : before));
        }
      }
    }

    // Scores become exp2(score - shift), after the shift has been raised to the largest score so far.
    FASTGEN_BODY void exponentials(Block& b, int64_t count) {
      for (int64_t i = 0; i < b.rows; ++i) {
        const W largest = X::max(X::load(b.largest + i * X::kLanes)) * b.factor;
        Vec total = X::load(b.total + i * X::kLanes);
        if (largest > b.shift[i]) {
          const W factor = std::exp2(b.shift[i] - largest);
          b.shift[i] = largest;
          total *= factor;
          for (int64_t c = 0; c < b.ld; ++c) b.sums[i * b.ld + c] *= factor;
        }
        const W shift = b.shift[i] == -kInf ? W(0) : b.shift[i];  // nothing seen but -inf so far
        W* const row = b.scores + i * kKeys;
        for (int64_t j = 0; j < count; j += X::kLanes) {
          const Vec p = X::template exp2<true>(X::load(row + j), b.factor, shift);
          total += p;
          X::store(row + j, p);
        }
        X::store(b.total + i * X::kLanes, total);
      }
    }
  };
};

template <typename T>
struct BackwardArgs {
  Shape g;
  View<const T> dout, q, k, v;
  const Wide<T>* sums;
  View<T> dq, dk, dv;
};

// A task is a whole head, since dk and dv are sums over all queries and dq over all keys.
struct Backward {
  // Queries in a block: as many as leave whole rows of p and dp in the L2 cache.
  static int64_t step(const Shape& g) { return g.s <= 1024 ? kRows : kRows / 2; }
  static int64_t scratch(const Shape& g) {
    const int64_t keys = round_up(g.s, 2 * kMaxLanes), ld = round_up(g.d, kMaxLanes) + 16;
    return keys * (2 * g.d + 3 * ld) + kRows * (3 * ld + 2 * (keys + 16) + kMaxLanes + 2);
  }

  template <Isa kIsa, typename T>
  FASTGEN_BODY void run(const BackwardArgs<T>* args, Wide<T>* memory, int64_t begin, int64_t end) {
    using W = Wide<T>;
    using X = Simd<W, vector_bytes(kIsa)>;
    const Shape& g = args->g;
    const int64_t ld = X::ld(g.d), keys = round_up(g.s, X::kPanel);
    Block<X, W> b{g, ld, static_cast<W>(g.factor())};
    b.stride = keys + 16;  // no power of two
    W* next = memory;
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    b.key_panels = take(keys * g.d), b.value_panels = take(keys * g.d), b.keys = take(keys * ld);
    b.dk = take(keys * ld), b.dv = take(keys * ld);
    b.queries = take(kRows * ld), b.dout = take(kRows * ld), b.dq = take(kRows * ld);
    b.p = take(kRows * b.stride), b.ds = take(kRows * b.stride), b.delta = take(kRows * X::kLanes);
    b.shift = take(kRows), b.inverse = take(kRows);
    for (int64_t head = begin; head < end; ++head) {
      const T *k = head_of(args->k, g, head), *v = head_of(args->v, g, head);
      pack_panels<X>(k, args->k.l, g.s, g.d, b.key_panels);
      pack_panels<X>(v, args->v.l, g.s, g.d, b.value_panels);
      pack_rows<X>(k, args->k.l, g.s, g.s, g.d, ld, W(1), b.keys);
      std::fill_n(b.dk, 2 * keys * ld, W(0));  // and dv, behind it
      for (b.first = 0; b.first < g.l; b.first += step(g)) {
        const int64_t rows = std::min(step(g), g.l - b.first);
        b.rows = round_up(rows, 4);
        const T* const dout = head_of(args->dout, g, head) + b.first * args->dout.l;
        pack_rows<X>(head_of(args->q, g, head) + b.first * args->q.l, args->q.l, rows, b.rows, g.d, ld,
                  static_cast<W>(g.sign()), b.queries);
        pack_rows<X>(dout, args->dout.l, rows, b.rows, g.d, ld, W(1), b.dout);
        std::fill_n(b.dq, b.rows * ld, W(0));
        for (int64_t i = 0; i < b.rows; ++i) {
          b.shift[i] = i < rows ? args->sums[head * g.l + b.first + i] : W(0);
          b.inverse[i] = i < rows ? W(1) / args->sums[(g.heads + head) * g.l + b.first + i] : W(0);
        }
        Block<X, W>::attend(b, rows);
        unpack<X>(b.dq, ld, rows, g.d, static_cast<W>(g.scale),
               head_of(args->dq, g, head) + b.first * args->dq.l, args->dq.l);
      }
      unpack<X>(b.dk, ld, g.s, g.d, static_cast<W>(std::abs(g.scale)), head_of(args->dk, g, head), args->dk.l);
      unpack<X>(b.dv, ld, g.s, g.d, W(1), head_of(args->dv, g, head), args->dv.l);
    }
  }

  template <typename X, typename W>
  struct Block {
    using Vec = typename X::Vec;
    const Shape& g;
    int64_t ld;
    W factor;
    W *key_panels, *value_panels, *keys;  // k and v as the forward packs k; k: [S, ld]
    W *dk, *dv;                           // [S, ld]
    W *queries, *dout, *dq;               // [rows, ld]
    W *p, *ds;             // [rows, stride]: probabilities; dout vᵀ, then the gradient of the scores
    W* delta;              // [rows, lanes]: the sum over keys of p (dout vᵀ)
    W *shift, *inverse;    // [rows]: p = exp2(score - shift) inverse
    int64_t first, rows, stride;

    // dp = dout vᵀ, ds = p (dp - sum p dp), dv = pᵀ dout, dq = ds k, dk = dsᵀ q; `count` of the rows are queries.
    // The sum is over the very p and dp that it is taken from, as in eager: where one key has all the weight, nothing
    // is left. (dout out, which is as much, has roundings of its own.)
    FASTGEN_BODY void attend(Block& b, int64_t count) {
      const int64_t all = b.g.keys(b.first + b.rows), width = X::width(b.g.d), ld = b.ld;
      std::fill_n(b.delta, b.rows * X::kLanes, W(0));
      for (int64_t j = 0; j < all; j += X::kPanel) {
        int64_t i = 0;
        for (; i + 6 <= b.rows; i += 6) tile<6>(b, i, j);
        for (; i < b.rows; i += 2) tile<2>(b, i, j);
      }
      for (int64_t i = 0; i < b.rows; ++i) b.delta[i] = X::sum(X::load(b.delta + i * X::kLanes));
      for (int64_t key = 0; key < all; key += kKeys) {
        const int64_t seen = std::min(kKeys, all - key), padded = round_up(seen, 4);
        W *const p = b.p + key, *const ds = b.ds + key;
        for (int64_t i = 0; i < b.rows; ++i)
          for (int64_t j = 0; j < seen; j += X::kLanes) {
            const int64_t at = i * b.stride + j;
            X::store(ds + at, X::load(p + at) * (X::load(ds + at) - b.delta[i]));
          }
        X::add_product(padded, width, p, 1, b.stride, b.dout, ld, count, b.dv + key * ld, ld);
        X::add_product(padded, width, ds, 1, b.stride, b.queries, ld, count, b.dk + key * ld, ld);
        X::add_product(b.rows, width, ds, b.stride, 1, b.keys + key * ld, ld, seen, b.dq, ld);
      }
    }

    template <int kM>
    FASTGEN_BODY void tile(Block& b, int64_t i, int64_t j) {
      Vec acc[kM][2] = {};
      X::template product<kM, 2>(acc, b.queries + i * b.ld, b.ld, 1, b.key_panels + j * b.g.d, X::kPanel, b.g.d);
      const int64_t seen = b.g.keys(b.first + i + 1) - j;
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          Vec p = X::template exp2<true>(acc[m][n], b.factor, b.shift[i + m]) * b.inverse[i + m];
          if (__builtin_expect(seen < X::kPanel, 0))
            p = X::first(b.g.keys(b.first + i + m + 1) - j - n * X::kLanes) ? p : Vec{};
          X::store(b.p + (i + m) * b.stride + j + n * X::kLanes, p);
          acc[m][n] = Vec{};
        }
      }
      X::template product<kM, 2>(acc, b.dout + i * b.ld, b.ld, 1, b.value_panels + j * b.g.d, X::kPanel, b.g.d);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        W* const delta = b.delta + (i + m) * X::kLanes;
        Vec sum = X::load(delta);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const int64_t at = (i + m) * b.stride + j + n * X::kLanes;
          sum += X::load(b.p + at) * acc[m][n];
          X::store(b.ds + at, acc[m][n]);
        }
        X::store(delta, sum);
      }
    }
  };
};

template <typename T>
View<T> view(const Tensor& x) {
  return {static_cast<T*>(const_cast<void*>(x.const_data_ptr())), x.stride(0), x.stride(1), x.stride(2)};
}

Shape shape_of(const Tensor& q, const Tensor& k, double scale, bool causal) {
  return {q.size(0) * q.size(1), q.size(2), k.size(2), q.size(3), scale, q.size(1), causal};
}

// q, out: [N, h, L, D]; k, v: [N, h, S, D], of any strides with the last dimension dense; sums: [2, N, h, L], what was
// taken off a row's scores and the sum of their exp2 then, in fp32 (fp64 for fp64), dense.
void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal, const Tensor& out,
                   const Tensor& sums) {
  const Shape g = shape_of(q, k, scale, causal);
  for_dtype(q, "attention", [&](auto zero) {
    using T = decltype(zero);
    const ForwardArgs<T> args{g, view<const T>(q), view<const T>(k), view<const T>(v), view<T>(out),
                              fastgen::out<Wide<T>>(sums)};
    torch::stable::parallel_for(0, g.heads * g.blocks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<Wide<T>> memory(Forward::scratch(g));
      multiversion<Forward>(&args, memory.data(), begin, end);
    });
  });
}

// dout, dq: as q; dk, dv: as k. sums: what the forward left.
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sums,
                   double scale, bool causal, const Tensor& dq, const Tensor& dk,
                   const Tensor& dv) {
  const Shape g = shape_of(q, k, scale, causal);
  for_dtype(q, "attention_bwd", [&](auto zero) {
    using T = decltype(zero);
    const BackwardArgs<T> args{g, view<const T>(dout), view<const T>(q), view<const T>(k), view<const T>(v),
                               in<Wide<T>>(sums), view<T>(dq), view<T>(dk), view<T>(dv)};
    torch::stable::parallel_for(0, g.heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<Wide<T>> memory(Backward::scratch(g));
      multiversion<Backward>(&args, memory.data(), begin, end);
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor(a!) out, Tensor(b!) sums) -> ()");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor sums, float scale, bool causal, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fastgen::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&fastgen::attention_bwd));
}
