// Vectors of a fixed width, by the compiler's own vector types: what a body uses that knows its instruction set.
#pragma once

#include <cstdint>

#include "common.h"

namespace fastgen {

template <Isa kIsa, typename W>
struct Simd {
  static constexpr int64_t kLanes = vector_bytes(kIsa) / static_cast<int>(sizeof(W));
  typedef W Vec __attribute__((vector_size(vector_bytes(kIsa))));
  typedef W Loose __attribute__((vector_size(vector_bytes(kIsa)), aligned(alignof(W)), may_alias));

  FASTGEN_BODY Vec load(const W* p) { return *reinterpret_cast<const Loose*>(p); }
  FASTGEN_BODY void store(W* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace fastgen
