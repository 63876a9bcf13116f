// Keys in 4 bits a channel, asymmetric min-max per token and KV head: side data for cheap estimates of q . k.
//   k~_d = min + scale * code_d,  scale = (max - min) / 15,  code rounded to nearest even
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

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
    const i64 d = kv.head_dim;
    float lo = kv.key(row, slot, 0), hi = lo;
    for (i64 e = 1; e < d; ++e) {
      const float k = kv.key(row, slot, e);
      lo = k < lo ? k : lo;
      hi = k > hi ? k : hi;
    }
    const float scale = (hi - lo > 1e-9f ? hi - lo : 1e-9f) / 15.f;
    range.at(row, slot, 0) = lo;
    range.at(row, slot, 1) = scale;
    for (i64 e = 0; e < d; ++e) {
      const u32 code = static_cast<u32>(fminf(15.f, rintf((kv.key(row, slot, e) - lo) / scale)));
      u8& pair = codes.at(row, slot, e / 2);
      pair = static_cast<u8>(e % 2 == 0 ? code : pair | code << 4);
    }
  }

  /// Sum of x(e) * k~_e.
  template <class F>
  LACUNA_HD float dot(i64 row, i64 slot, i64 d, F x) const {
    const float lo = range.at(row, slot, 0), scale = range.at(row, slot, 1);
    float sum = 0.f;
    for (i64 e = 0; e < d; ++e) {
      const u32 code = codes.at(row, slot, e / 2) >> (e % 2 * 4) & 15u;
      sum += x(e) * (lo + scale * static_cast<float>(code));
    }
    return sum;
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
