// Rows of a call: which slots their queries sit at, their targets, and the ranking of their units.
#pragma once

#include <vector>

#include "lacuna/pipeline/select.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Slots [begin, end) of a row's queries; `end` slots are visible to its last one.
struct RowSlots {
  sdk::i64 begin, end;
};
RowSlots row_slots(const sdk::Paged& kv, const sdk::Rows& rows, sdk::i64 row, sdk::i32 num_kv_heads);

/// A budget that owns its arrays; every row ranked.
class OwnedBudget {
 public:
  explicit OwnedBudget(const sdk::Rows& rows);
  sdk::Budget& view() { return view_; }

 private:
  std::vector<sdk::i64> longs_;
  std::vector<sdk::i32> ints_;
  sdk::Budget view_{};
};

/// The k best units of one row, ties to the lower index, -inf never; ascending.
std::vector<sdk::i32> top_units(const std::vector<float>& value, sdk::i64 k);

/// The forced units' mass counts first; then the others in descending order while the mass before them is below p times
/// the row's total (the crossing unit included). Returns the units beside the forced ones, ascending.
std::vector<sdk::i32> top_mass_units(const std::vector<float>& candidate, const std::vector<float>& value,
                                     const std::vector<sdk::i32>& forced, double p);

/// Query-head rows [num_qo_heads * tiles, units] reduced over each group; a unit that no head scored stays -inf.
std::vector<float> reduce_rows(const std::vector<float>& value, const sdk::Layer& layer, sdk::i32 tiles, sdk::i64 units,
                               sdk::Gqa how);

/// Adds a ranked row's target (counted for every query head that reads the row) and its slack of one unit.
void account_target(BudgetAccount& account, const sdk::Layer& layer, const sdk::Rows& rows, RowSlots at, sdk::i64 pairs,
                    sdk::i32 unit_tokens);

/// Replaces each row's finite scores by their rank within the row over its length, best nearest 1 (for allocators that
/// compare heads whose scores are not comparable).
void rank_normalise(float* value, sdk::i64 rows, sdk::i64 stride, const std::vector<sdk::i64>& count);

}  // namespace lacuna
