// SimHash (Charikar 2002, "Similarity estimation techniques from rounding algorithms"): codes made of the signs of a
// vector on seeded Gaussian hyperplanes, 16 to a word. Two vectors differ in a bit with probability angle / pi.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Hyperplanes of a word. All are stored even where fewer are used, so that the loop over them unrolls.
inline constexpr i32 kCodeBits = 16;

/// Elements of the state that holds the planes of `words` words for vectors of d channels.
inline i64 plane_elements(i64 words, i64 d) { return words * d * kCodeBits; }

/// The planes in a strategy's state, ready for a lambda.
struct SimHashPlanes {
  float* data;  // [sets, words, d, kCodeBits], zero-filled before draw()
  i64 words, d;
  i32 bits;  // of a word that are used

  /// Code of the vector x(0) .. x(d - 1) in one word; a sum of exactly 0 gives a bit 0.
  template <class F>
  LACUNA_HD u16 code(i64 set, i64 word, F x) const {
    const float* plane = data + (set * words + word) * d * kCodeBits;
    float sum[kCodeBits] = {};
    for (i64 e = 0; e < d; ++e) {
      const float v = x(e);
      for (i32 b = 0; b < kCodeBits; ++b) sum[b] += v * plane[e * kCodeBits + b];
    }
    u32 code = 0;
    for (i32 b = 0; b < bits; ++b) code |= (sum[b] > 0.f ? 1u : 0u) << b;
    return static_cast<u16>(code);
  }
};

/// Draws the planes; a later call changes nothing. All sets are equal. Component e of plane b of word w is
/// random.normal(w * kCodeBits + b, e) at step 0: the planes depend on seed and layer, not on when they are drawn.
inline void draw(Context& c, const SimHashPlanes& planes, i64 sets) {
  Random random = c.random();
  random.step = 0;
  c.for_each(sets * planes.words * planes.d, [=] LACUNA_HD(i64 i) {
    float* const plane = planes.data + i * kCodeBits;
    if (plane[0] != 0.f) return;
    const u64 first = static_cast<u64>(i / planes.d % planes.words * kCodeBits),
              channel = static_cast<u64>(i % planes.d);
    for (i32 b = 0; b < planes.bits; ++b) plane[b] = random.normal(first + static_cast<u64>(b), channel);
  });
}

/// Words in which two codes are equal.
LACUNA_HD inline i32 equal_words(const u16* a, const u16* b, i64 words) {
  i32 equal = 0;
  for (i64 w = 0; w < words; ++w) equal += a[w] == b[w];
  return equal;
}

/// Bits in which two codes differ.
LACUNA_HD inline i32 hamming_distance(const u16* a, const u16* b, i64 words) {
  i32 distance = 0;
  for (i64 w = 0; w < words; ++w)
    for (u32 x = static_cast<u32>(a[w] ^ b[w]); x; x &= x - 1) ++distance;
  return distance;
}

}  // namespace lacuna::sdk
