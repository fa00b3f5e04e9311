// Vectorised Philox normals on the CPU: the numbers of csrc/common/philox.h, many counters at a time.
#pragma once

#include "../common/philox.h"

namespace fastgen {

constexpr int kNoiseLanes = 64;                      // counters per round: SIMD registers full at any width
constexpr int64_t kNoiseSpan = 4 * kNoiseLanes * 2;  // elements a task asks for at most

// Room for the normals of kNoiseSpan elements that start anywhere in a counter's four.
struct NoiseBuffer {
  alignas(64) float v[kNoiseSpan + 4 * kNoiseLanes + 4];
};

// Normals of the elements [first, first + count) of the image with this seed; returns where the first stands.
// Compiled once, and dispatched by itself: call it outside of bodies.
const float* fill_normals(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t count,
                          NoiseBuffer& buffer);

}  // namespace fastgen
