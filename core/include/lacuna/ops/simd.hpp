// Vector code for the hot loops of a portable build: fixed-width vectors of the compiler's own, and one dispatcher that
// compiles a loop for each instruction set and picks the machine's at run time.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>
#include <vector>

#include "lacuna/sdk/types.hpp"

#define LACUNA_INLINE __attribute__((always_inline)) inline
#define LACUNA_INLINE_LAMBDA __attribute__((always_inline))

namespace lacuna::simd {

enum class Isa { portable, avx2, avx512 };

/// What the loops use: the best that this machine has, or less after use_isa().
Isa isa();
/// Lowers the choice to `wanted` (tests run every variant); returns what is in use. Not while a kernel runs.
Isa use_isa(Isa wanted);

/// Bytes of a vector register. Wider vectors compile too, but the compiler takes them apart into scalars.
constexpr int register_bytes(Isa isa) { return isa == Isa::avx512 ? 64 : isa == Isa::avx2 ? 32 : 16; }

template <class T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T)), may_alias));
};
template <class T, int n>
struct UnalignedOf {
  typedef T type __attribute__((vector_size(n * sizeof(T)), aligned(alignof(T)), may_alias));
};
/// n elements; loads and stores through a pointer to it need alignment to its size (Unaligned: to one element).
template <class T, int n>
using Vector = typename VectorOf<T, n>::type;
template <class T, int n>
using Unaligned = typename UnalignedOf<T, n>::type;

template <class To, class From>
LACUNA_INLINE To& vector_at(From* p) {
  return *reinterpret_cast<To*>(p);
}

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, std::size_t) noexcept { ::operator delete (p, std::align_val_t{64}); }
  bool operator==(const AlignedAllocator&) const { return true; }
};
/// Storage for Vector loads: 64-byte aligned.
template <class T>
using Aligned = std::vector<T, AlignedAllocator<T>>;

/// e^x within 2 ulp for x in [-87.3, 88.3], 0 below, NaN for NaN (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]).
template <int n>
LACUNA_INLINE void exp(Vector<float, n>& x) {
  using F = Vector<float, n>;
  using Word = Vector<sdk::u32, n>;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F magic = x * 1.44269504088896341f + kRound;
  const F whole = magic - kRound;
  const F r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  F y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const Word bits = reinterpret_cast<const Word&>(y) + ((reinterpret_cast<const Word&>(magic) - 0x4b400000u) << 23);
  const auto underflow = x < -87.3f;
  const Word kept = bits & ~reinterpret_cast<const Word&>(underflow);
  x = reinterpret_cast<const F&>(kept);
}

#if defined(__x86_64__)
template <class F>
[[gnu::target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"), gnu::noinline]] void run_avx512(const F& f) {
  f(std::integral_constant<Isa, Isa::avx512>{});
}
template <class F>
[[gnu::target("avx2,fma"), gnu::noinline]] void run_avx2(const F& f) {
  f(std::integral_constant<Isa, Isa::avx2>{});
}
#endif

/// Runs f(isa), compiled for the instruction set in use. f is `[&](auto isa) LACUNA_INLINE_LAMBDA {...}`, and what it
/// calls must be inlined too.
template <class F>
void multiversion(const F& f) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return run_avx512(f);
    case Isa::avx2: return run_avx2(f);
    case Isa::portable: break;
  }
#endif
  f(std::integral_constant<Isa, Isa::portable>{});
}

}  // namespace lacuna::simd
