#include "lacuna/ops/simd.hpp"

#include <algorithm>

namespace lacuna::simd {
namespace {

Isa detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa& current() {
  static Isa value = detect();
  return value;
}

}  // namespace

Isa isa() { return current(); }

Isa use_isa(Isa wanted) { return current() = std::min(wanted, detect()); }

}  // namespace lacuna::simd
