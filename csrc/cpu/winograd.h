// Winograd's minimal filtering algorithms F(m, r): m outputs of an r-tap filter by m + r - 1 multiplications
// (Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", section 4).
//
//   y = A^T [(G g) * (B^T d)],   d: [m + r - 1] inputs, g: [r] taps, y: [m]
//
// In two dimensions each matrix is applied to columns, then to rows. Below, one dimension: the arrays hold numbers
// or vectors of channels. The adjoints A m and G^T u make the weight gradient.
#pragma once

#include "isa.h"

namespace fastgen {

// F(4, 3), interpolation points 0, 1, -1, 2, -2, infinity.
struct F43 {
  static constexpr int kOut = 4, kTaps = 3, kIn = 6;

  template <typename V>
  FASTGEN_BODY void data(const V* d, V* t) {  // B^T d
    const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    const V near = d[4] - d[2], far = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] - 5 * d[2] + d[4];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = near + far;
    t[4] = near - far;
    t[5] = 4 * d[1] - 5 * d[3] + d[5];
  }
  template <typename V>
  FASTGEN_BODY void output(const V* m, V* y) {  // A^T m
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
    y[1] = d1 + 2 * d2;
    y[2] = s1 + 4 * s2;
    y[3] = d1 + 8 * d2 + m[5];
  }
  template <typename V>
  FASTGEN_BODY void output_adjoint(const V* y, V* m) {  // A y
    const V even1 = y[0] + y[2], odd1 = y[1] + y[3], even2 = y[0] + 4 * y[2], odd2 = 2 * y[1] + 8 * y[3];
    m[0] = y[0];
    m[1] = even1 + odd1;
    m[2] = even1 - odd1;
    m[3] = even2 + odd2;
    m[4] = even2 - odd2;
    m[5] = y[3];
  }
  template <typename V, typename W>
  FASTGEN_BODY void filter(const V* g, V* u, W) {  // G g
    const V outer = g[0] + g[2], quarter = W(1.0 / 24) * g[0] + W(1.0 / 6) * g[2];
    u[0] = W(0.25) * g[0];
    u[1] = W(-1.0 / 6) * (outer + g[1]);
    u[2] = W(-1.0 / 6) * (outer - g[1]);
    u[3] = quarter + W(1.0 / 12) * g[1];
    u[4] = quarter - W(1.0 / 12) * g[1];
    u[5] = g[2];
  }
  template <typename V, typename W>
  FASTGEN_BODY void filter_adjoint(const V* u, V* g, W) {  // G^T u
    const V s1 = u[1] + u[2], d1 = u[1] - u[2], s2 = u[3] + u[4], d2 = u[3] - u[4];
    g[0] = W(0.25) * u[0] - W(1.0 / 6) * s1 + W(1.0 / 24) * s2;
    g[1] = W(1.0 / 12) * d2 - W(1.0 / 6) * d1;
    g[2] = u[5] - W(1.0 / 6) * (s1 - s2);
  }
};

// The transform of four inputs, for F(2, 3) and F(3, 2): points 0, 1, -1, infinity.
struct FourPoints {
  static constexpr int kIn = 4;

  template <typename V>
  FASTGEN_BODY void data(const V* d, V* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
};

struct F23 : FourPoints {
  static constexpr int kOut = 2, kTaps = 3;

  template <typename V>
  FASTGEN_BODY void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  template <typename V>
  FASTGEN_BODY void output_adjoint(const V* y, V* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = -y[1];
  }
  template <typename V, typename W>
  FASTGEN_BODY void filter(const V* g, V* u, W) {
    const V outer = W(0.5) * (g[0] + g[2]);
    u[0] = g[0];
    u[1] = outer + W(0.5) * g[1];
    u[2] = outer - W(0.5) * g[1];
    u[3] = g[2];
  }
  template <typename V, typename W>
  FASTGEN_BODY void filter_adjoint(const V* u, V* g, W) {
    const V s = W(0.5) * (u[1] + u[2]);
    g[0] = u[0] + s;
    g[1] = W(0.5) * (u[1] - u[2]);
    g[2] = u[3] + s;
  }
};

struct F32 : FourPoints {
  static constexpr int kOut = 3, kTaps = 2;

  template <typename V>
  FASTGEN_BODY void output(const V* m, V* y) {
    const V s = m[1] + m[2];
    y[0] = m[0] + s;
    y[1] = m[1] - m[2];
    y[2] = s - m[3];
  }
  template <typename V, typename W>
  FASTGEN_BODY void filter(const V* g, V* u, W) {
    u[0] = g[0];
    u[1] = W(0.5) * (g[0] + g[1]);
    u[2] = W(0.5) * (g[0] - g[1]);
    u[3] = g[1];
  }
};

// No transform: the multiplications are those of the sum itself, one output at a time.
struct Direct {
  static constexpr int kOut = 1, kTaps = 0, kIn = 1;
};

}  // namespace fastgen
