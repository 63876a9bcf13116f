// What one row of a selection reads, as the canonical sorted set: the one place where overlapping pieces, tokens, exact
// sinks and windows become cells. Attention, budgets, metrics, the contract checker and `dump` all go through it.
#pragma once

#include <vector>

#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Slots in ascending order, each once. A query at slot s reads slot j of the set iff j <= s, and besides every j <= s
/// with j < exact_sinks or s - j < exact_window. `log_weight` is empty when the selection has none; a token that a
/// piece and a token list both name takes the piece's weight; exact cells outside the set weigh 0.
struct RowSet {
  std::vector<sdk::i32> slots;
  std::vector<float> log_weight;
  sdk::i32 exact_sinks = 0, exact_window = 0;

  /// Log weight of a slot that is read: 0 for one that only the exact parts hold.
  float weight(sdk::i32 slot) const;
  /// Cells read by the queries at slots [begin, end).
  sdk::i64 pairs(sdk::i64 begin, sdk::i64 end) const;
  /// Distinct slots that any query at slots [begin, end) reads: what a pass over the tile fetches.
  sdk::i64 touched(sdk::i64 begin, sdk::i64 end) const;
  /// The sorted union of slots that any query at slots [begin, end) reads.
  std::vector<sdk::i32> cells(sdk::i64 begin, sdk::i64 end) const;
};

/// `visible`: slots that the tile's last query sees (its own included); lists are cut there. A full row lists them all.
RowSet expand_row(const sdk::Selection& selection, sdk::i64 row, sdk::i64 visible);

/// Union of sets of one KV head (the heads of a GQA group), unweighted.
RowSet unite(const std::vector<const RowSet*>& sets);

}  // namespace lacuna
