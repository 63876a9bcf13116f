// What the parameter gqa asks of a strategy that reduces a group's scores itself.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Whether every query head chooses by itself.
inline bool ranks_each_head(Gqa g) { return g == Gqa::none || g == Gqa::union_; }

/// How the heads of a group become one, where they do.
inline Reduce reduce_of(Gqa g) { return g == Gqa::max ? Reduce::max : g == Gqa::mean ? Reduce::mean : Reduce::sum; }

/// x(head) of the query heads behind `row` as one number >= 0: of the head itself where rows are query heads, else of
/// its group, reduced as gqa says.
template <class X>
LACUNA_HD double reduce_heads(const Rows& rows, i64 row, i64 group, Gqa gqa, X x) {
  const i64 first = rows.per_query_head ? row : row * group, count = rows.per_query_head ? 1 : group;
  double reduced = 0;
  for (i64 head = first; head < first + count; ++head)
    reduced = gqa == Gqa::max ? fmax(reduced, x(head)) : reduced + x(head);
  return gqa == Gqa::mean ? reduced / static_cast<double>(count) : reduced;
}

}  // namespace lacuna::sdk
