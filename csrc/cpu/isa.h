// cpu / isa: instruction-set levels of the CPU backend, chosen at run time.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define SAFT_X86_DISPATCH 1
#define SAFT_TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define SAFT_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,bmi,bmi2,popcnt")))
#else
#define SAFT_X86_DISPATCH 0
#endif

namespace saft {

// Ordered: a level includes the ones below it. The numbers are the binding's. AVX-512 as Ice Lake and Zen 4 have it:
// with VBMI2, which compresses bytes.
enum Isa : int { kIsaAuto = -1, kIsaBaseline = 0, kIsaAvx2 = 1, kIsaAvx512 = 2 };

inline Isa best_isa() {
#if SAFT_X86_DISPATCH
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vbmi2");
    return avx512 ? kIsaAvx512 : avx2 ? kIsaAvx2 : kIsaBaseline;
  }();
  return best;
#else
  return kIsaBaseline;
#endif
}

inline Isa resolve_isa(int requested) {
  return requested == kIsaAuto || requested > best_isa() ? best_isa() : Isa(requested);
}

}  // namespace saft
