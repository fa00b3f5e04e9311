// Vectorised Philox normals on the CPU: the numbers of csrc/common/philox.h, many counters at a time.
#pragma once

#include "../common/philox.h"
#include "isa.h"

namespace fastgen {

constexpr int kNoiseLanes = 64;                      // counters per round: SIMD registers full at any width
constexpr int64_t kNoiseSpan = 4 * kNoiseLanes * 2;  // elements a task asks for at most

// Room for the normals of kNoiseSpan elements that start anywhere in a counter's four.
struct NoiseBuffer {
  alignas(64) float v[kNoiseSpan + 4 * kNoiseLanes + 4];
};

// Normals of the elements [first, first + count) of the image with this seed; returns where the first stands.
FASTGEN_BODY const float* fill_normals(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t count,
                                       NoiseBuffer& buffer) {
  const int64_t block = first / 4, skipped = first % 4;
  const int64_t blocks = (skipped + count + 3) / 4;
  alignas(64) float lanes[4][kNoiseLanes];
  for (int64_t b = 0; b < blocks; b += kNoiseLanes) {
    const uint32_t start = static_cast<uint32_t>(block + b);
    for (int i = 0; i < kNoiseLanes; ++i) {
      float z[4];
      normal4(seed, start + static_cast<uint32_t>(i), step, stream, z);
      lanes[0][i] = z[0];
      lanes[1][i] = z[1];
      lanes[2][i] = z[2];
      lanes[3][i] = z[3];
    }
    float* out = buffer.v + 4 * b;
    const int n = static_cast<int>(blocks - b < kNoiseLanes ? blocks - b : kNoiseLanes);
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < 4; ++k) out[4 * i + k] = lanes[k][i];
  }
  return buffer.v + skipped;
}

}  // namespace fastgen
