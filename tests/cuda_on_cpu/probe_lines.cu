// Which elements the threads of csrc/cuda/lines.cuh have, in tensors too large to be made.
#include "cuda/lines.cuh"

namespace fastgen {
namespace {

constexpr int64_t kSkip = int64_t{1} << 60;  // where the second source begins; the first begins at 0

template <int kVec, int kWide>
void look(const Plan& shape, int early, int64_t block, int64_t thread, int64_t* to) {
  const Plan p = spread(shape, kVec, kWide, 2);
  blockIdx = dim3(static_cast<unsigned>(block));
  threadIdx = dim3(static_cast<unsigned>(thread));
  const Place<kVec, kWide> at(p);
  const auto line = line_of<kVec>(p, at.image, at.channel, reinterpret_cast<const int8_t*>(0),
                                  reinterpret_cast<const int8_t*>(kSkip), early);
  const int64_t found[] = {at.image, at.channel, at.first, at.end, at.lanes, reinterpret_cast<int64_t>(line.at),
                           line.step, p.bundles * int64_t{p.parts}, kVec};
  std::copy(std::begin(found), std::end(found), to);
}

// out [9]: image, channel, first item, end, lanes, where the line starts, step, blocks of an image, elements of an
// item.
void lines(int64_t channels, int64_t early, int64_t positions, bool columns, bool vectors, int64_t block,
           int64_t thread, const Tensor& result) {
  Plan p{};
  p.channels = static_cast<int>(channels);
  p.positions = positions;
  p.columns = columns;
  auto* to = out<int64_t>(result);
  const int first = static_cast<int>(early);
  if (!vectors) return look<1, 1>(p, first, block, thread, to);
  if (columns) return look<8, 8>(p, first, block, thread, to);
  look<8, 1>(p, first, block, thread, to);
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda, m) {
  m.def(
      "lines(int channels, int early, int positions, bool columns, bool vectors, int block, int thread, "
      "Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CUDA, m) { m.impl("lines", TORCH_BOX(&fastgen::lines)); }
