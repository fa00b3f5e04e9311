// ema: averages of many tensors, e <- e + w (p - e) for several w, in one pass over them; see fastgen/training/ema.py.
#include <cmath>
#include <vector>

#include "common.h"

namespace fastgen {
namespace {

constexpr int64_t kBlock = 1024;     // elements of p that stay in the nearest cache for all averages
constexpr int64_t kPiece = 65536;    // elements that a thread takes at once
constexpr int64_t kAlone = 1 << 22;  // updates that one thread makes by itself: waking another may take longer

struct Ema {
  // p, and each of the averages e[k] for w[k]: elements begin to end. Block by block, so that p comes from memory once.
  template <Isa kIsa, typename T>
  FASTGEN_BODY void run(const T* p, T* const* e, const T* w, int64_t averages, int64_t begin, int64_t end) {
    for (; begin < end; begin += kBlock)
      for (int64_t k = 0; k < averages; ++k) block<kIsa>(p + begin, e[k] + begin, w[k], std::min(kBlock, end - begin));
  }

  // As torch.lerp_: from the nearer end, and product and sum rounded together where the instruction set has that.
  template <Isa kIsa, typename T>
  FASTGEN_BODY void block(const T* p, T* e, T w, int64_t n) {
    const bool near = std::abs(w) < T(0.5);
    const T factor = near ? w : w - T(1);
    const T* base = near ? e : p;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = product_sum<kIsa>(factor, p[i] - e[i], base[i]);
  }

  template <Isa kIsa, typename T>
  FASTGEN_BODY T product_sum(T a, T b, T c) {
    if constexpr (kIsa == Isa::generic && FASTGEN_X86_64) return a * b + c;
    return std::fma(a, b, c);
  }
};

// params: [tensors]; averages: [weights][tensors]. Threads take pieces of all tensors in a row, small ones together.
template <typename T>
void update(const std::vector<Tensor>& params, const std::vector<Tensor>& averages, const std::vector<T>& weights) {
  const int64_t tensors = params.size(), count = weights.size();
  std::vector<const T*> p(tensors);
  std::vector<T*> e(tensors * count);
  std::vector<int64_t> first(tensors + 1);  // where each begins in that row
  for (int64_t i = 0; i < tensors; ++i) {
    p[i] = in<T>(params[i]);
    for (int64_t k = 0; k < count; ++k) e[i * count + k] = out<T>(averages[k * tensors + i]);
    first[i + 1] = first[i] + params[i].numel();
  }
  const auto take = [&](int64_t piece) {
    const int64_t begin = piece * kPiece, end = std::min(begin + kPiece, first.back());
    for (int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1; first[i] < end; ++i) {
      multiversion<Ema>(p[i], static_cast<T* const*>(&e[i * count]), weights.data(), count,
                        std::max(begin, first[i]) - first[i], std::min(end, first[i + 1]) - first[i]);
    }
  };
  const int64_t pieces = (first.back() + kPiece - 1) / kPiece;
  if (first.back() * count >= kAlone) return take_turns(pieces, take);
  for (int64_t piece = 0; piece < pieces; ++piece) take(piece);
}

// params, fp32 or fp64, all alike and without gaps; averages: one after the other, each like its parameter in memory
void ema_update(std::vector<Tensor> params, std::vector<Tensor> averages, std::vector<double> weights) {
  if (averages.empty()) return;
  const auto dtype = params[0].scalar_type();
  STD_TORCH_CHECK(averages.size() == params.size() * weights.size(), "ema: one average for each parameter and weight");
  for (size_t i = 0; i < averages.size(); ++i) {
    const Tensor &e = averages[i], &p = params[i % params.size()];
    STD_TORCH_CHECK(e.sizes() == p.sizes() && e.strides() == p.strides() && e.scalar_type() == dtype &&
                        p.scalar_type() == dtype && e.is_cpu() && p.is_cpu(),
                    "ema: averages must be like their parameters: sizes, strides, dtype, on the CPU");
  }
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "ema: tensors must be fp32 or fp64");
  if (dtype == ScalarType::Double) return update<double>(params, averages, weights);
  update<float>(params, averages, {weights.begin(), weights.end()});
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cpp, m) {
  m.def("ema_update(Tensor[] params, Tensor(a!)[] averages, float[] weights) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cpp, CPU, m) { m.impl("ema_update", TORCH_BOX(&fastgen::ema_update)); }
