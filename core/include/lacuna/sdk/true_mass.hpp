// The true softmax mass as scores, for clairvoyant selections.
#pragma once

#include <string>

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Tokens of a unit that a parameter names `token`, `page` or `block`.
inline i32 tokens_of_unit(const std::string& name) { return name == "token" ? 1 : name == "page" ? 16 : 64; }

/// Mean over a row's queries of the dense probability that falls into each unit, so that a row sums to 1.
inline void mean_true_mass(Context& c, Scores& s) {
  c.oracle_mass(s);
  const Rows rows = s.rows;
  const i64 units = s.units, stride = s.stride;
  float* value = s.value;
  c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
    const i64 row = i / units;
    value[row * stride + i % units] /= static_cast<float>(rows.query_end(row) - rows.query_begin(row));
  });
}

}  // namespace lacuna::sdk
