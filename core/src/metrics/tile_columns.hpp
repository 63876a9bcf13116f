// The columns that a row of the matched oracle may choose from, and what they cost.
#pragma once

#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Columns of the queries at slots [first, end): all that they see, or those outside `sinks` columns and an exact
/// window (0: none). A column is a key for every query that sees it and has it in no window; only columns with such
/// queries count: [begin(), past()).
struct TileColumns {
  sdk::i64 first, end;
  sdk::i32 sinks = 0, window = 0;

  LACUNA_HD sdk::i64 past() const { return end > window ? end - window : 0; }
  LACUNA_HD sdk::i64 begin() const { return sinks < past() ? sinks : past(); }
  /// From here on the window holds a part of a column: it ends at the queries before slot + window.
  LACUNA_HD sdk::i64 cut() const {
    if (window <= 0) return past();
    const sdk::i64 slot = first - window + 1;
    return slot < 0 ? 0 : slot > past() ? past() : slot;
  }
  /// Queries of a column.
  LACUNA_HD sdk::i64 cost(sdk::i64 slot) const { return end - (slot + window > first ? slot + window : first); }
  /// Of all columns together.
  LACUNA_HD sdk::i64 total_cost() const {
    const sdk::i64 from = begin(), whole = first - window + 1;  // columns before `whole` have every query
    const sdk::i64 bend = whole < from ? from : whole > past() ? past() : whole, slant = past() - bend;
    return (bend - from) * (end - first) + slant * (slant + 1) / 2;
  }
};

}  // namespace lacuna
