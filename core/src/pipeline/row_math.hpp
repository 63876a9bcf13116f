// What a ranked row must read, by arithmetic alone: the same on host and device.
#pragma once

#include "lacuna/pipeline/budget.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Slots [begin, end) of a row's queries; `end` slots are visible to its last one.
struct RowSlots {
  sdk::i64 begin, end;
};

/// `length` [sequences * num_kv_heads]: cached tokens, where the caller can read it.
LACUNA_HD inline RowSlots row_slots(const sdk::i32* length, const sdk::Rows& rows, sdk::i64 row,
                                    sdk::i32 num_kv_heads) {
  const sdk::i64 first = length[rows.kv_row(row, num_kv_heads)] - rows.num_queries;
  return {first + rows.query_begin(row), first + rows.query_end(row)};
}

/// How a strategy's rows are ranked: its plan and its budget, in numbers.
struct RankRule {
  TargetRule target;
  sdk::i32 unit_tokens = 1, sinks = 0, recent = 0, first_units = 0, last_units = 0, min_units = 0;
  sdk::i64 default_units = -1;  // < 0: none
  double top_p = -1;            // < 0: none
  sdk::i32 num_kv_heads = 1;
};

/// The units of a row that are read whatever they score: [0, first) and [suffix, units), and beside them exact sinks
/// and window.
struct ForcedUnits {
  sdk::i32 first, suffix, units;
  sdk::i64 prefix_end, suffix_begin;  // slots: [0, prefix_end) with the exact sinks, and from suffix_begin on

  LACUNA_HD ForcedUnits(const RankRule& rule, RowSlots at) {
    const sdk::i32 unit = rule.unit_tokens, diagonal = static_cast<sdk::i32>(at.begin / unit);
    units = static_cast<sdk::i32>((at.end + unit - 1) / unit);
    first = rule.first_units < units ? rule.first_units : units;
    suffix = units;
    if (rule.last_units > 0) {
      const sdk::i32 begin = diagonal - rule.last_units + 1;
      suffix = begin > first ? begin : first;
    }
    const sdk::i64 listed = static_cast<sdk::i64>(first) * unit;
    prefix_end = listed < at.end ? listed : at.end;
    if (rule.sinks > prefix_end) prefix_end = rule.sinks;
    suffix_begin = suffix < units ? static_cast<sdk::i64>(suffix) * unit : at.end;
  }

  LACUNA_HD sdk::i32 count() const { return first + units - suffix; }
  LACUNA_HD bool holds(sdk::i64 unit) const { return unit < first || unit >= suffix; }
  /// Forced units, and one for the exact part.
  LACUNA_HD sdk::i64 count_with_exact(const RankRule& rule) const { return count() + (rule.sinks + rule.recent > 0); }

  /// (query, key) pairs of all that is forced.
  LACUNA_HD sdk::i64 pairs(const RankRule& rule, RowSlots at) const {
    sdk::i64 total = 0;
    for (sdk::i64 q = at.begin; q < at.end; ++q) {
      sdk::i64 tail = rule.recent > 0 ? q - rule.recent + 1 : q + 1;
      if (tail < 0) tail = 0;
      if (suffix_begin < tail) tail = suffix_begin;
      const sdk::i64 head = prefix_end < q + 1 ? prefix_end : q + 1;
      total += tail <= head ? q + 1 : head + (tail <= q ? q + 1 - tail : 0);
    }
    return total;
  }

  /// Whether a unit has nothing left to be ranked for: forced, or held by the exact part (a token for any query of the
  /// row; a larger unit for every one).
  LACUNA_HD bool settled(const RankRule& rule, RowSlots at, sdk::i64 unit) const {
    if (holds(unit)) return true;
    if (rule.unit_tokens == 1)
      return unit < prefix_end || unit >= suffix_begin || (rule.recent > 0 && unit > at.begin - rule.recent);
    const sdk::i64 unit_begin = unit * rule.unit_tokens, unit_end = unit_begin + rule.unit_tokens;
    const sdk::i64 begin = unit_begin > rule.sinks ? unit_begin : rule.sinks,
                   end = unit_end < at.end ? unit_end : at.end;
    return begin >= end || begin >= at.end - rule.recent;
  }
};

/// How many units a row ranks.
struct RankedCount {
  sdk::i64 units;  // beside the forced ones
  bool floor;      // what must be read exceeds the target
};

/// `tokens`, `pairs`: the row's target. Not for rows that are cut by mass.
LACUNA_HD inline RankedCount ranked_count(const RankRule& rule, const ForcedUnits& forced, RowSlots at, sdk::i64 tokens,
                                          sdk::i64 pairs) {
  const sdk::i64 with_exact = forced.count_with_exact(rule), queries = at.end - at.begin;
  const sdk::i64 least_units = (rule.min_units > 1 ? rule.min_units : 1) - with_exact;
  if (!rule.target.limited()) {
    const sdk::i64 own = rule.default_units - forced.count();
    return {own > least_units ? own : least_units, false};
  }
  if (rule.target.kind == BudgetSpec::Kind::units) {
    const sdk::i64 wanted = tokens / rule.unit_tokens;
    return {wanted > forced.count() ? wanted - forced.count() : 0, forced.count() > wanted};
  }
  const sdk::i64 forced_pairs = forced.pairs(rule, at);
  sdk::i64 least = forced_pairs;
  if (least_units > 0) least += least_units * rule.unit_tokens * queries;
  // A tile that straddles K has a smaller target than the ones after it; what counts is whether K itself has room.
  const sdk::i64 room = tokens * queries > pairs ? tokens * queries : pairs;
  return {ranked_units(pairs, forced_pairs, with_exact, rule.unit_tokens, queries, rule.min_units), least > room};
}

}  // namespace lacuna
