// upfirdn2d: upsampling by zeros, a filter, downsampling; see fastgen/ops/upfirdn2d.py.
//
// An output pixel meets one tap in up, and pixels up / gcd(up, down) apart (a phase) meet the same taps. So the pixels
// of a row that are in one phase are a weighted sum of rows of numbers, if an input row is kept with zeros on both
// sides, and with its pixels sorted by their place modulo down / gcd(up, down). All arithmetic is that sum, over
// vectors. Contiguous images are planes of single numbers; channels last, the pixels are kChannels of them. A thread
// takes a band of output rows of a plane, for which the input rows fit into the cache; a separable filter runs over
// these rows first and then across them. Every number is the sum of the same terms in the same order.
// There is no noise here, so a multiplication and an addition may become one fused instruction.
#pragma GCC optimize("fp-contract=fast")

#include <numeric>
#include <vector>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int64_t kChannels = 16;       // that make up a pixel, channels last
constexpr int64_t kBand = 128 * 1024;   // bytes of input rows
constexpr int64_t kFewest = 16;         // input rows of a band, however long they are
constexpr int64_t kSlack = 64;          // numbers that a vector may read behind a row
constexpr int64_t kGrain = 32 * 1024;   // numbers that are worth a thread

// One direction. Output o begins at the upsampled place o down - pad, and meets inputs input(o) … with every up-th tap
// from tap(o) on.
struct Axis {
  int64_t taps, up, down, pad, in, out;
  int64_t phases, step;  // outputs `phases` apart meet inputs `step` apart, with the same taps
  int64_t lowest, sub;   // the first input that any output meets; inputs of a row that are equal modulo step

  Axis(int64_t taps_, int64_t up_, int64_t down_, int64_t pad_, int64_t in_, int64_t out_)
      : taps(taps_), up(up_), down(down_), pad(pad_), in(in_), out(out_) {
    phases = up / std::gcd(up, down), step = down / std::gcd(up, down);
    lowest = input(0);
    sub = (input(out - 1) + terms(out - 1) + (taps + up - 1) / up - lowest) / step + 1;
  }
  int64_t tap(int64_t o) const { return ((pad - o * down) % up + up) % up; }
  int64_t input(int64_t o) const { return (o * down - pad + tap(o)) / up; }
  int64_t terms(int64_t o) const { return std::max<int64_t>(0, (taps - tap(o) + up - 1) / up); }
  int64_t outputs(int64_t phase) const { return phase < out ? (out - phase + phases - 1) / phases : 0; }
};

// out = sum of weights[t] rows[t], up to the next whole vector. out: [n + kSlack]
struct WeightedSum {
  template <Isa kIsa, typename W>
  FASTGEN_BODY void run(const W* const* rows, const W* weights, int64_t terms, W* out, int64_t n) {
    using S = Simd<kIsa, W>;
    constexpr int kAtOnce = 4;
    int64_t i = 0;
    for (; i + kAtOnce * S::kLanes <= n; i += kAtOnce * S::kLanes) {
      typename S::Vec sum[kAtOnce] = {};
      for (int64_t t = 0; t < terms; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) sum[j] += weights[t] * S::load(rows[t] + i + j * S::kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) S::store(out + i + j * S::kLanes, sum[j]);
    }
    for (; i < n; i += S::kLanes) {
      typename S::Vec sum = {};
      for (int64_t t = 0; t < terms; ++t) sum += weights[t] * S::load(rows[t] + i);
      S::store(out + i, sum);
    }
  }
};

// n pixels of `channels` numbers, from stride apart to apart apart, widened or narrowed. A lone number a pixel is the
// usual case, and has loops of its own.
template <typename From, typename To>
FASTGEN_BODY void copy_body(const From* __restrict from, int64_t stride, To* __restrict to, int64_t apart, int64_t n,
                            int64_t channels) {
  if (channels == 1 && stride == 1 && apart == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  } else if (channels == 1) {
    for (int64_t i = 0; i < n; ++i) to[i * apart] = static_cast<To>(from[i * stride]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[i * apart + c] = static_cast<To>(from[i * stride + c]);
    }
  }
}

// What all threads know.
template <typename W>
struct Plan {
  Axis x, y;
  const W* f;  // [taps] or [fh, fw]
  bool separable, flip;
  W gain;
  int64_t pixel;          // numbers that lie together
  int64_t line, filtered; // numbers of an input row, sorted; of a row that is filtered along x, phase by phase
  int64_t height;         // output rows of a band

  W tap(const Axis& a, int64_t k) const { return f[flip ? k : a.taps - 1 - k]; }
  W tap(int64_t ky, int64_t kx) const {
    return gain * f[(flip ? ky : y.taps - 1 - ky) * x.taps + (flip ? kx : x.taps - 1 - kx)];
  }
  // The numbers of a phase, with the room that vectors need.
  int64_t room(int64_t phase) const { return x.outputs(phase) * pixel + kSlack; }
};

template <typename T>
class Worker {
  using W = Wide<T>;
  const Plan<W>& p;
  int64_t rows = 0;             // input rows that there is room for
  std::vector<W> lines, alongs, sum;
  std::vector<const W*> from;   // the terms of a weighted sum
  std::vector<W> weights;

  // Where the input row stands that begins at in[i] for output phase q, m terms on.
  const W* at(int64_t slot, int64_t i) const {
    const int64_t e = i - p.x.lowest;
    return lines.data() + slot * p.line + e % p.x.step * (p.x.sub * p.pixel + kSlack) + e / p.x.step * p.pixel;
  }

  void add_row(int64_t slot, int64_t q, W factor, int64_t ky) {
    for (int64_t m = 0; m < p.x.terms(q); ++m) {
      const int64_t k = p.x.tap(q) + m * p.x.up;
      from.push_back(at(slot, p.x.input(q) + m));
      weights.push_back(p.separable ? factor * p.tap(p.x, k) : p.tap(ky, k));
    }
  }
  void clear() { from.clear(), weights.clear(); }
  void add_up(W* out, int64_t n) {
    multiversion<WeightedSum>(from.data(), weights.data(), static_cast<int64_t>(from.size()), out, n);
  }

 public:
  explicit Worker(const Plan<W>& plan) : p(plan) {}

  // Output rows first … last - 1 of one plane. in, out: its first pixel, of `channels` numbers; pixels are stride
  // numbers apart
  void run(const T* in, T* out, int64_t first, int64_t last, int64_t stride, int64_t channels) {
    const int64_t top = std::max<int64_t>(0, p.y.input(first));
    int64_t bottom = 0;  // phases differ in where they end
    for (int64_t o = std::max(first, last - p.y.phases); o < last; ++o)
      bottom = std::max(bottom, std::min(p.y.in, p.y.input(o) + p.y.terms(o)));
    load(in, top, bottom, stride, channels);
    for (int64_t o = first; o < last; ++o) {
      if (p.separable) {
        clear();
        for (int64_t m = 0, i = p.y.input(o), k = p.y.tap(o); m < p.y.terms(o); ++m, ++i, k += p.y.up)
          if (i >= 0 && i < p.y.in)
            from.push_back(alongs.data() + (i - top) * p.filtered), weights.push_back(p.gain * p.tap(p.y, k));
        add_up(sum.data(), p.filtered - kSlack);
      }
      int64_t begin = 0;
      for (int64_t q = 0; q < p.x.phases; ++q) {
        if (!p.separable) {
          clear();
          for (int64_t m = 0, i = p.y.input(o), k = p.y.tap(o); m < p.y.terms(o); ++m, ++i, k += p.y.up)
            if (i >= 0 && i < p.y.in) add_row(i - top, q, W(1), k);
          add_up(sum.data() + begin, p.x.outputs(q) * p.pixel);
        }
        T* to = out + (o * p.x.out + q) * stride;
        multiversion<copy_body<W, T>>(sum.data() + begin, p.pixel, to, p.x.phases * stride, p.x.outputs(q), channels);
        begin += p.room(q);
      }
    }
  }

 private:
  // Input rows top … bottom - 1, sorted; for a separable filter also filtered.
  void load(const T* in, int64_t top, int64_t bottom, int64_t stride, int64_t channels) {
    if (bottom - top > rows || sum.empty()) {
      rows = std::max<int64_t>(1, bottom - top);
      lines.assign(rows * p.line, W(0));  // what lies outside the image stays 0
      alongs.assign(p.separable ? rows * p.filtered : 0, W(0));
      sum.assign(p.filtered, W(0));
    }
    for (int64_t i = top; i < bottom; ++i) {
      for (int64_t r = 0; r < p.x.step; ++r) {
        // Inputs lowest + r, + step …: from the first that is in the image to the last that is, or that is met.
        const int64_t start = p.x.lowest + r, skip = start < 0 ? (-start + p.x.step - 1) / p.x.step : 0;
        const int64_t from_pixel = start + skip * p.x.step;
        const int64_t n = std::min(p.x.sub - skip, (p.x.in - from_pixel + p.x.step - 1) / p.x.step);
        if (from_pixel >= p.x.in || n <= 0) continue;
        W* to = lines.data() + (i - top) * p.line + r * (p.x.sub * p.pixel + kSlack) + skip * p.pixel;
        const T* row = in + (i * p.x.in + from_pixel) * stride;
        multiversion<copy_body<T, W>>(row, p.x.step * stride, to, p.pixel, n, channels);
      }
      if (!p.separable) continue;
      for (int64_t q = 0, begin = 0; q < p.x.phases; begin += p.room(q), ++q) {
        clear();
        add_row(i - top, q, W(1), 0);
        add_up(alongs.data() + (i - top) * p.filtered + begin, p.x.outputs(q) * p.pixel);
      }
    }
  }
};

// x: [N, C, H, W], y: [N, C, H', W'], both contiguous or both channels last; f: [fh, fw] or [taps] of a separable
// filter, in fp32 (fp64 for fp64); pad_x, pad_y: zeros left of and above the upsampled image, or pixels cropped
void upfirdn2d_fwd(const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y,
                   int64_t pad_x, int64_t pad_y, bool flip, double gain, const Tensor& y) {
  for_dtype(x, "upfirdn2d", [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    const int64_t c = x.size(1);
    const bool last = c > 1 && !(x.is_contiguous() && y.is_contiguous());
    const int64_t stride = last ? c : 1, chunks = last ? (c + kChannels - 1) / kChannels : 1;
    const int64_t planes = x.size(0) * (last ? chunks : c);
    Plan<W> p{Axis(f.size(f.dim() - 1), up_x, down_x, pad_x, x.size(3), y.size(3)),
              Axis(f.size(0), up_y, down_y, pad_y, x.size(2), y.size(2)),
              in<W>(f), f.dim() == 1, flip, static_cast<W>(gain), last ? std::min(c, kChannels) : 1, 0, 0, 0};
    p.line = p.x.step * (p.x.sub * p.pixel + kSlack);
    for (int64_t q = 0; q < p.x.phases; ++q) p.filtered += p.room(q);
    const int64_t fit = std::max(kFewest, kBand / (p.line * static_cast<int64_t>(sizeof(W))));
    p.height = std::clamp<int64_t>((fit - p.y.taps / up_y) * up_y / down_y, 1 + kFewest / 4, p.y.out + kFewest);
    const int64_t bands = (p.y.out + p.height - 1) / p.height, size_in = x.size(2) * x.size(3) * stride;
    const int64_t size_out = p.y.out * p.x.out * stride;
    const int64_t work = std::min(p.height, p.y.out) * p.x.out * p.pixel;
    torch::stable::parallel_for(0, planes * bands, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
      Worker<T> worker(p);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / bands, first = i % bands * p.height;
        const int64_t image = plane / chunks, channel = plane % chunks * kChannels;
        worker.run(in<T>(x) + image * size_in + channel, out<T>(y) + image * size_out + channel, first,
                   std::min(p.y.out, first + p.height), stride, last ? std::min(kChannels, c - channel) : 1);
      }
    });
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def(
      "upfirdn2d_fwd(Tensor x, Tensor f, int up_x, int up_y, int down_x, int down_y, int pad_x, int pad_y, bool flip, "
      "float gain, Tensor(a!) y) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("upfirdn2d_fwd", TORCH_BOX(&fastgen::upfirdn2d_fwd)); }
