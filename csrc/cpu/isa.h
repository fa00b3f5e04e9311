// One function, compiled for several instruction sets, chosen at run time: the library is built for plain
// x86-64 (or whatever the machine is) and still uses AVX2 or AVX-512 where the CPU has it.
//
//   template <typename T>
//   FASTGEN_BODY void scale_body(const T* x, T* y, T factor, int64_t n) {   // x, y: [n]
//     for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
//   }
//   ...
//   torch::stable::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
//     multiversion<scale_body<T>>(x + begin, y + begin, factor, end - begin);
//   });
//
// The call goes inside the lambda: a lambda does not inherit the instruction set of the function around it.
//
// Where the body must know its vector width, it is a template over the instruction set, in a struct:
//
//   struct Gemm {
//     template <Isa kIsa, typename T>
//     FASTGEN_BODY void run(const T* a, const T* b, T* c) {
//       constexpr int kLanes = vector_bytes(kIsa) / sizeof(T);
//       ...
//     }
//   };
//   multiversion<Gemm>(a, b, c);
//
// Why not compile a file once per instruction set: templates and inline functions that two objects share are
// merged by the linker, which may keep the AVX-512 copy for everybody: a crash on older machines. Here each
// version has a symbol of its own and all it calls is inlined into it (`flatten`).
#pragma once

#include <utility>

namespace fastgen {

enum class Isa { generic, avx2, avx512 };

// The instruction set in use: the best one this CPU has, or what FASTGEN_CPU_ISA says (generic, avx2,
// avx512; read once). Throws where that names none of them, or one that the CPU lacks.
Isa isa();

const char* isa_name(Isa value);

// The size of a vector register. Plain x86-64 and ARM have 16 bytes.
constexpr int vector_bytes(Isa value) {
  return value == Isa::avx512 ? 64 : value == Isa::avx2 ? 32 : 16;
}

// A body exists only inside the versions made of it: it must not be called by itself across a file boundary.
#define FASTGEN_BODY [[maybe_unused]] static inline __attribute__((always_inline))

// The levels of the x86-64 psABI: v3 is AVX2, FMA and BMI (Haswell, Zen), v4 adds AVX-512 F, BW, CD, DQ
// and VL (Skylake-X, Zen 4).
#if defined(__x86_64__)
#define FASTGEN_X86_64 1
#define FASTGEN_AVX2 __attribute__((target("arch=x86-64-v3"), flatten))
#define FASTGEN_AVX512 __attribute__((target("arch=x86-64-v4"), flatten))
#else
#define FASTGEN_X86_64 0
#define FASTGEN_AVX2
#define FASTGEN_AVX512
#endif

namespace detail {

template <auto kBody>
struct Versions;

template <typename R, typename... Args, R (*kBody)(Args...)>
struct Versions<kBody> {
  FASTGEN_AVX512 static R avx512(Args... args) { return kBody(args...); }
  FASTGEN_AVX2 static R avx2(Args... args) { return kBody(args...); }
  __attribute__((flatten)) static R generic(Args... args) { return kBody(args...); }

  static R run(Args... args) {
#if FASTGEN_X86_64
    switch (isa()) {
      case Isa::avx512: return avx512(args...);
      case Isa::avx2: return avx2(args...);
      case Isa::generic: break;
    }
#endif
    return generic(args...);
  }
};

template <typename Kernel, typename... Args>
FASTGEN_AVX512 auto run_avx512(Args... args) {
  return Kernel::template run<Isa::avx512>(args...);
}
template <typename Kernel, typename... Args>
FASTGEN_AVX2 auto run_avx2(Args... args) {
  return Kernel::template run<Isa::avx2>(args...);
}
template <typename Kernel, typename... Args>
__attribute__((flatten)) auto run_generic(Args... args) {
  return Kernel::template run<Isa::generic>(args...);
}

}  // namespace detail

// Call a body, compiled for the instruction set in use. Arguments are those of the body.
template <auto kBody, typename... Args>
inline auto multiversion(Args&&... args) {
  return detail::Versions<kBody>::run(std::forward<Args>(args)...);
}

// The same for a struct whose `run` is a template over Isa. Arguments are passed by value: pointers and numbers.
template <typename Kernel, typename... Args>
inline auto multiversion(Args... args) {
#if FASTGEN_X86_64
  switch (isa()) {
    case Isa::avx512: return detail::run_avx512<Kernel>(args...);
    case Isa::avx2: return detail::run_avx2<Kernel>(args...);
    case Isa::generic: break;
  }
#endif
  return detail::run_generic<Kernel>(args...);
}

}  // namespace fastgen
