// Bounds of the keys of a unit, channel by channel, and of a query's products with them.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// First slot after unit `unit` of `unit_tokens` slots; a row's last unit may be partial.
LACUNA_HD inline i64 unit_end(const Paged& kv, i64 row, i64 unit, i64 unit_tokens) {
  const i64 end = (unit + 1) * unit_tokens;
  return end < kv.length[row] ? end : kv.length[row];
}

struct KeyRange {
  float lo, hi;
};

/// Least and largest of one channel over the keys at slots [begin, end), begin < end.
LACUNA_HD inline KeyRange key_range(const Paged& kv, i64 row, i64 begin, i64 end, i64 channel) {
  KeyRange r{kv.key(row, begin, channel), 0.f};
  r.hi = r.lo;
  for (i64 t = begin + 1; t < end; ++t) {
    const float k = kv.key(row, t, channel);
    r.lo = k < r.lo ? k : r.lo;
    r.hi = k > r.hi ? k : r.hi;
  }
  return r;
}

/// Brings lo and hi, sides of head_dim elements a unit, up to date.
inline void bound_keys(Context& c, const Dirty& dirty, SideView<float> lo, SideView<float> hi) {
  const Paged kv = c.kv();
  const Dirty of = dirty;
  const i64 d = kv.head_dim, units = dirty.max_units;
  c.for_each(dirty.rows * units * d, [=] LACUNA_HD(i64 i) {
    const i64 channel = i % d, row = i / d / units, unit = of.begin[row] + i / d % units;
    if (unit >= of.end[row]) return;
    const KeyRange r = key_range(kv, row, unit * of.unit_tokens, unit_end(kv, row, unit, of.unit_tokens), channel);
    lo.at(row, unit, channel) = r.lo;
    hi.at(row, unit, channel) = r.hi;
  });
}

/// The most that q . k can be for keys within the bounds, q the first query of the head; unscaled.
LACUNA_HD inline float largest_product(const Queries& q, i64 seq, i64 head, const SideView<float>& lo,
                                       const SideView<float>& hi, i64 kv_row, i64 unit) {
  float sum = 0.f;
  for (i64 e = 0; e < q.head_dim; ++e) {
    const float x = q.at(seq, head, 0, e);
    const float a = x * lo.at(kv_row, unit, e), b = x * hi.at(kv_row, unit, e);
    sum += a > b ? a : b;
  }
  return sum;
}

}  // namespace lacuna::sdk
