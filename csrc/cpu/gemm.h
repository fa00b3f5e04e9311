// The inner loops of matrix products. A block of kRows x kPanel sums stays in registers over the whole depth;
// kPanel is two vectors, so that rows x 2 sums, two vectors of b and one of a fit 16 registers.
#pragma once

#include "simd.h"

namespace fastgen {

constexpr int64_t kRows = 6;
constexpr int64_t kAhead = 48;  // rows of a panel between its prefetch and its use

// Columns in a panel of a packed right-hand side.
template <Isa kIsa, typename W>
constexpr int64_t kPanel = 2 * Simd<kIsa, W>::kLanes;

// A stretch of the depth: `count` numbers, at `offset` from where each row of the left-hand side begins.
struct Run {
  int64_t offset, count;
};

// out[i][j] = sum over runs, over d, of rows[i][run.offset + d] b[d][j].
// rows: kM pointers; b: [depth, kPanel]; out: [kM, kPanel], ld apart
template <Isa kIsa, int kM, typename W>
FASTGEN_BODY void gemm_block(const W* const* rows, int64_t base, const Run* runs, int64_t nruns, const W* b, W* out,
                             int64_t ld) {
  using S = Simd<kIsa, W>;
  typename S::Vec low[kM], high[kM];
  const W* a[kM];
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    low[i] = high[i] = typename S::Vec{};
    a[i] = rows[i] + base;
  }
  for (int64_t r = 0; r < nruns; ++r) {
    const int64_t end = runs[r].offset + runs[r].count;
    for (int64_t d = runs[r].offset; d < end; ++d, b += kPanel<kIsa, W>) {
      __builtin_prefetch(b + kAhead * kPanel<kIsa, W>);
      const typename S::Vec b0 = S::load(b), b1 = S::load(b + S::kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kM; ++i) {
        low[i] += a[i][d] * b0;
        high[i] += a[i][d] * b1;
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    S::store(out + i * ld, low[i]);
    S::store(out + i * ld + S::kLanes, high[i]);
  }
}

// The same for any number of rows up to kRows.
template <Isa kIsa, typename W>
FASTGEN_BODY void gemm_rows(int64_t m, const W* const* rows, int64_t base, const Run* runs, int64_t nruns, const W* b,
                            W* out, int64_t ld) {
  switch (m) {
    case 6: return gemm_block<kIsa, 6>(rows, base, runs, nruns, b, out, ld);
    case 5: return gemm_block<kIsa, 5>(rows, base, runs, nruns, b, out, ld);
    case 4: return gemm_block<kIsa, 4>(rows, base, runs, nruns, b, out, ld);
    case 3: return gemm_block<kIsa, 3>(rows, base, runs, nruns, b, out, ld);
    case 2: return gemm_block<kIsa, 2>(rows, base, runs, nruns, b, out, ld);
    default: return gemm_block<kIsa, 1>(rows, base, runs, nruns, b, out, ld);
  }
}

// out[i][j] (+)= sum over t of a[t][i] b[t][j], i < kM, j < kPanel. a: rows lda apart; b: ldb apart; out: ld apart
template <Isa kIsa, int kM, typename W>
FASTGEN_BODY void outer_block(int64_t depth, const W* a, int64_t lda, const W* b, int64_t ldb, W* out, int64_t ld,
                              bool add) {
  using S = Simd<kIsa, W>;
  typename S::Vec low[kM], high[kM];
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    low[i] = add ? S::load(out + i * ld) : typename S::Vec{};
    high[i] = add ? S::load(out + i * ld + S::kLanes) : typename S::Vec{};
  }
  for (int64_t t = 0; t < depth; ++t, a += lda, b += ldb) {
    const typename S::Vec b0 = S::load(b), b1 = S::load(b + S::kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kM; ++i) {
      low[i] += a[i] * b0;
      high[i] += a[i] * b1;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kM; ++i) {
    S::store(out + i * ld, low[i]);
    S::store(out + i * ld + S::kLanes, high[i]);
  }
}

}  // namespace fastgen
