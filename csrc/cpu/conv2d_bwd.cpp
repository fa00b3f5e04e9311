// The weight gradient of conv2d by Winograd's algorithm: the adjoint of the forward, tile by tile,
//
//   dW = G^T [ sum over tiles (B^T d B) * (A dy A^T) ] G,
//
// where the products are, for each of the F numbers, v^T [C, tiles] times the transformed output gradient
// [tiles, K]. The data gradient needs nothing here: it is a convolution with the reversed weights.
#pragma GCC optimize("fp-contract=fast", "no-tree-loop-distribute-patterns")

#include <atomic>

#include "conv2d.h"

namespace fastgen {
namespace {

constexpr int64_t kBoth = 8 << 20;  // bytes of v and the transformed gradient at once: the sums pass once for each

// A dy A^T of tile rows [begin, end), counted over all images; dy is p.y's shape. m: [F, tiles, ld]
struct Spread {
  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY void run(F, const Conv<W>* call, const void* dy, W* m, int64_t stride, int64_t ld, int64_t first,
                        int64_t begin, int64_t end) {
    using S = Simd<kIsa, W>;
    using Vec = typename S::Vec;
    constexpr int kIn = F::kIn, kOut = F::kOut;
    const Conv<W>& p = *call;
    const Grid<F> grid(p);
    alignas(64) W tile[kOut * kOut][kSpread];
    for (int64_t t = (begin - first) * grid.cols; t < (end - first) * grid.cols; ++t) {
      const int64_t u = first + t / grid.cols, image = u / grid.rows;
      for (int64_t k0 = 0; k0 < p.k; k0 += kSpread) {
        const int64_t kn = std::min(kSpread, p.k - k0), width = round_up(kn, 2 * S::kLanes);
        for_images<W>(p.dtype, [&](auto zero) __attribute__((always_inline)) {
          using T = decltype(zero);
          for (int i = 0; i < kOut * kOut; ++i) {
            const int64_t y = u % grid.rows * kOut + i / kOut, x = t % grid.cols * kOut + i % kOut;
            const bool inside = y < p.gh && x < p.gw;
            const T* from = static_cast<const T*>(dy) + (inside ? ((image * p.gh + y) * p.gw + x) * p.k + k0 : 0);
            for (int64_t c = 0; c < (inside ? kn : 0); ++c) tile[i][c] = static_cast<W>(from[c]);
            for (int64_t c = inside ? kn : 0; c < width; ++c) tile[i][c] = W(0);
          }
        });
        for (int64_t e = 0; e < width; e += S::kLanes) {
          Vec part[kOut][kIn];
          for (int j = 0; j < kOut; ++j) {
            Vec column[kOut];
            for (int i = 0; i < kOut; ++i) column[i] = S::load(&tile[i * kOut + j][e]);
            F::output_adjoint(column, part[j]);
          }
          for (int i = 0; i < kIn; ++i) {
            Vec row[kOut], out[kIn];
            for (int j = 0; j < kOut; ++j) row[j] = part[j][i];
            F::output_adjoint(row, out);
            for (int j = 0; j < kIn; ++j) S::store(m + (i * kIn + j) * stride + t * ld + k0 + e, out[j]);
          }
        }
      }
    }
  }
  static constexpr int64_t kSpread = 64;
};

// Rows [begin, end) of du [F * channels, ld], of which a row is the sum over tiles of v[f, t, c] m[f, t, :].
struct Products {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(const W* v, int64_t v_stride, int64_t v_ld, const W* m, int64_t m_stride, int64_t m_ld,
                        int64_t tiles, W* du, bool add, int64_t begin, int64_t end) {
    constexpr int64_t kN = kPanel<kIsa, W>;
    for (int64_t i = begin; i < end;) {  // v_ld is a multiple of the vector width, not of kRows
      const int64_t f = i / v_ld, c = i % v_ld, rows = std::min({kRows, v_ld - c, end - i});
      const W *a = v + f * v_stride + c, *b = m + f * m_stride;
      for (int64_t k = 0; k < m_ld; k += kN) {
        W* out = du + i * m_ld + k;
        if (rows == kRows)
          outer_block<kIsa, kRows>(tiles, a, v_ld, b + k, m_ld, out, m_ld, add);
        else
          for (int64_t r = 0; r < rows; ++r)
            outer_block<kIsa, 1>(tiles, a + r, v_ld, b + k, m_ld, out + r * m_ld, m_ld, add);
      }
      i += rows;
    }
  }
};

// dweight [K, C, r, r] of channels [begin, end) from du [F, channels, ld]; channel c stands in row c, from c1 on in
// row c + gap. Returns 0 if all of it is finite, else NaN.
struct Gather {
  template <Isa kIsa, typename F, typename W>
  FASTGEN_BODY W run(F, const W* du, int64_t channels, int64_t ld, int64_t c1, int64_t gap, int64_t k, int64_t c_all,
                     W* dweight, int64_t begin, int64_t end) {
    using S = Simd<kIsa, W>;
    using Vec = typename S::Vec;
    constexpr int kIn = F::kIn, kTaps = F::kTaps;
    Vec bad{};
    for (int64_t c = begin; c < end; ++c)
      for (int64_t k0 = 0; k0 < k; k0 += S::kLanes) {
        const W* from = du + (c + (c < c1 ? 0 : gap)) * ld + k0;
        Vec part[kIn][kTaps];
        for (int j = 0; j < kIn; ++j) {
          Vec column[kIn];
          for (int i = 0; i < kIn; ++i) column[i] = S::load(from + (i * kIn + j) * channels * ld);
          F::filter_adjoint(column, part[j], W(0));
        }
        for (int r = 0; r < kTaps; ++r) {
          Vec row[kIn], g[kTaps];
          for (int j = 0; j < kIn; ++j) row[j] = part[j][r];
          F::filter_adjoint(row, g, W(0));
          for (int s = 0; s < kTaps; ++s) {
            bad += g[s] - g[s];
            for (int64_t e = 0; e < std::min(S::kLanes, k - k0); ++e)
              dweight[(((k0 + e) * c_all + c) * kTaps + r) * kTaps + s] = g[s][e];
          }
        }
      }
    W sum = 0;
    for (int64_t e = 0; e < S::kLanes; ++e) sum += bad[e];
    return sum;
  }
};

template <typename F, typename W>
bool weight_gradient(const Conv<W>& p, const void* dy, W* dweight) {
  const Grid<F> grid(p);
  const int64_t channels = round_up(p.c1, lanes<W>()) + round_up(p.c2, lanes<W>()), ld = round_up(p.k, 2 * lanes<W>());
  const int64_t rows = p.n * grid.rows, bytes = kNumbers<F> * grid.cols * (channels + ld) * sizeof(W);
  const int64_t most = std::max<int64_t>(1, kBoth / bytes), count = (rows + most - 1) / most;
  const int64_t longest = (rows + count - 1) / count * grid.cols;
  W* v = static_cast<W*>(scratch<0>(kNumbers<F> * (longest * channels + kSkew) * sizeof(W)));
  W* m = static_cast<W*>(scratch<3>(kNumbers<F> * (longest * ld + kSkew) * sizeof(W)));
  W* du = static_cast<W*>(scratch<4>(kNumbers<F> * channels * ld * sizeof(W)));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = rows * i / count, here = rows * (i + 1) / count - first, tiles = here * grid.cols;
    const int64_t v_stride = tiles * channels + kSkew, m_stride = tiles * ld + kSkew;
    transform<F>(p, v, v_stride, channels, first, here);
    torch::stable::parallel_for(0, here, 1, [&](int64_t begin, int64_t end) {
      multiversion<Spread>(F{}, &p, dy, m, m_stride, ld, first, first + begin, first + end);
    });
    // Cut at whole blocks of rows within a number, so that no sum depends on the number of threads.
    const int64_t blocks = (channels + kRows - 1) / kRows;
    torch::stable::parallel_for(0, kNumbers<F> * blocks, 1, [&](int64_t begin, int64_t end) {
      const auto row = [&](int64_t b) { return b / blocks * channels + std::min(b % blocks * kRows, channels); };
      multiversion<Products>(static_cast<const W*>(v), v_stride, channels, static_cast<const W*>(m), m_stride, ld, tiles,
                             du, i > 0, row(begin), row(end));
    });
  }
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, p.c(), 8, [&](int64_t begin, int64_t end) {
    const W bad = multiversion<Gather>(F{}, static_cast<const W*>(du), channels, ld, p.c1,
                                       round_up(p.c1, lanes<W>()) - p.c1, p.k, p.c(), dweight, begin, end);
    if (bad != W(0)) finite = false;
  });
  return finite;
}

// The gradient of weights [K, C, 3, 3] (F(4, 3) or F(2, 3)); dy: [N, K, H', W'], channels last; dweight: contiguous,
// fp32 (fp64 for fp64); the rest as in conv2d_fwd. Returns whether all of it is finite.
int64_t conv2d_weight_bwd(const Tensor& dy, const Tensor& x, const OptTensor& skip, const OptTensor& mean,
                          const OptTensor& rstd, const OptTensor& norm_weight, const OptTensor& norm_bias,
                          const OptTensor& scale, const OptTensor& shift, int64_t in_act, int64_t pt, int64_t pl,
                          int64_t algorithm, const Tensor& dweight) {
  bool finite = true;
  for_dtype(x, "conv2d_weight_bwd", [&](auto zero) {
    using W = Wide<decltype(zero)>;
    const int64_t c2 = skip ? skip->size(1) : 0;
    const Prologue<W> pro(x.size(0), x.size(1) + c2, mean, rstd, norm_weight, norm_bias, scale, shift);
    Conv<W> p{x.const_data_ptr(), skip ? skip->const_data_ptr() : nullptr};
    if (mean) p.mean = pro.mean.data(), p.a = pro.a.data(), p.b = pro.b.data();
    p.n = x.size(0), p.c1 = x.size(1), p.c2 = c2, p.h = x.size(2), p.w = x.size(3), p.k = dy.size(1);
    p.pt = pt, p.pl = pl, p.phases = 1, p.gh = dy.size(2), p.gw = dy.size(3);
    p.in_act = static_cast<int>(in_act), p.dtype = x.scalar_type();
    finite = algorithm == kF23 ? weight_gradient<F23>(p, dy.const_data_ptr(), out<W>(dweight))
                               : weight_gradient<F43>(p, dy.const_data_ptr(), out<W>(dweight));
  });
  return finite;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "conv2d_weight_bwd(Tensor dy, Tensor x, Tensor? skip, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? scale, Tensor? shift, int in_act, int pt, int pl, int algorithm, "
      "Tensor(a!) dweight) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("conv2d_weight_bwd", TORCH_BOX(&fastgen::conv2d_weight_bwd)); }
