#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace fastgen {
namespace {

constexpr Isa kAll[] = {Isa::generic, Isa::avx2, Isa::avx512};

bool has(Isa value) {
#if FASTGEN_X86_64
  if (value == Isa::avx512) return __builtin_cpu_supports("x86-64-v4");
  if (value == Isa::avx2) return __builtin_cpu_supports("x86-64-v3");
#endif
  return value == Isa::generic;
}

Isa choose() {
  Isa best = Isa::generic;
  for (const Isa value : kAll) {
    if (has(value)) best = value;
  }
  const char* wish = std::getenv("FASTGEN_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (const Isa value : kAll) {
    if (std::string_view(wish) != isa_name(value)) continue;
    STD_TORCH_CHECK(has(value), "FASTGEN_CPU_ISA=", wish, ": this CPU has no ", wish, "; the best it has is ",
                    isa_name(best), " (choices: generic, avx2, avx512)");
    return value;
  }
  STD_TORCH_CHECK(false, "FASTGEN_CPU_ISA=", wish, " is unknown (choices: generic, avx2, avx512)");
  return best;
}

}  // namespace

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::generic: break;
  }
  return "generic";
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace fastgen
