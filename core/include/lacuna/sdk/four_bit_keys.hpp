// Keys in 4 bits a channel, asymmetric min-max per token and KV head: side data for cheap estimates of q . k.
//   k~_d = min + scale * code_d,  scale = (max - min) / 15,  code rounded to nearest even
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Codes of n numbers x(e), of `levels` + 1 <= 16 values: two a byte, the even one low. range: min and scale.
template <class X>
LACUNA_HD void encode_four_bits(u8* codes, float* range, i64 n, i32 levels, X x) {
  float lo = x(0), hi = lo;
  for (i64 e = 1; e < n; ++e) {
    const float v = x(e);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
  const float most = static_cast<float>(levels), scale = (hi - lo > 1e-9f ? hi - lo : 1e-9f) / most;
  range[0] = lo;
  range[1] = scale;
  for (i64 e = 0; e < n; ++e) {
    const u32 code = static_cast<u32>(fminf(most, rintf((x(e) - lo) / scale)));
    codes[e / 2] = static_cast<u8>(e % 2 == 0 ? code : codes[e / 2] | code << 4);
  }
}

/// Sum of y(e) times what the codes stand for.
template <class Y>
LACUNA_HD float dot_four_bits(const u8* codes, const float* range, i64 n, Y y) {
  const float lo = range[0], scale = range[1];
  float sum = 0.f;
  for (i64 e = 0; e < n; ++e) sum += y(e) * (lo + scale * static_cast<float>(codes[e / 2] >> (e % 2 * 4) & 15u));
  return sum;
}

/// Both sides, ready for a lambda.
struct FourBitKeys {
  SideView<u8> codes;     // two channels a byte, the even one low
  SideView<float> range;  // min and scale

  explicit FourBitKeys(Context& c) : codes(c.side<u8>("codes")), range(c.side<float>("range")) {}

  /// Declares the sides in plan(); they move along on compaction.
  static void plan(Plan& p, i64 head_dim) {
    p.sides[p.num_sides++] = {"codes", SidePer::token, 1, Dtype::u8, (head_dim + 1) / 2, 1};
    p.sides[p.num_sides++] = {"range", SidePer::token, 1, Dtype::f32, 2, 1};
  }
  static double bytes(i64 head_dim) { return static_cast<double>(head_dim / 2) + 8.0; }  // of a token

  LACUNA_HD void encode(const Paged& kv, i64 row, i64 slot) const {
    encode_four_bits(&codes.at(row, slot), &range.at(row, slot), kv.head_dim, 15,
                     [=](i64 e) { return kv.key(row, slot, e); });
  }

  /// Sum of x(e) * k~_e.
  template <class F>
  LACUNA_HD float dot(i64 row, i64 slot, i64 d, F x) const {
    return dot_four_bits(&codes.at(row, slot), &range.at(row, slot), d, x);
  }
};

/// index() of a strategy with these sides.
inline void encode_keys(Context& c, const Dirty& dirty) {
  const FourBitKeys keys(c);
  const Paged kv = c.kv();
  const i64 d = kv.head_dim, units = dirty.max_units;
  c.for_each(dirty.rows * units, [=] LACUNA_HD(i64 i) {
    const i64 row = i / units, slot = dirty.begin[row] + i % units;
    if (slot < dirty.end[row]) keys.encode(kv, row, slot);
  });
  const double tokens = static_cast<double>(dirty.rows) * static_cast<double>(units);
  c.charge(tokens * (static_cast<double>(size_of(kv.dtype) * d) + FourBitKeys::bytes(d)), 5.0 * tokens * d);
}

}  // namespace lacuna::sdk
