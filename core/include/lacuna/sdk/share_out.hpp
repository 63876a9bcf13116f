// For allocators: whole units shared out in proportion to weights, by largest remainders.
#pragma once

#include "lacuna/sdk/types.hpp"

namespace lacuna::sdk {

/// Shares `total` units (rounded half up) among the `count` rows begin, begin + step, ...: given(row) in proportion to
/// weight(row) >= 0, at most most(row); what a row cannot use goes to the others in the same proportion, and the last
/// units go by the largest remainders, ties to the lower row. given: array by row. Exact for whole numbers.
template <class Weight, class Most>
LACUNA_HD void share_out(double total, i64 begin, i64 count, i64 step, Weight weight, Most most, i64* given) {
  constexpr i64 kOpen = -1;
  const i64 end = begin + count * step;
  double left = total, weights = 0;
  for (i64 row = begin; row < end; row += step) {
    given[row] = weight(row) > 0 ? kOpen : 0;
    weights += weight(row);
  }
  for (bool again = true; again;) {  // rows that get all they can use
    again = false;
    for (i64 row = begin; row < end; row += step) {
      const double limit = static_cast<double>(most(row));
      if (given[row] != kOpen || left * weight(row) < limit * weights) continue;
      given[row] = most(row);
      left -= limit;
      weights -= weight(row);
      again = true;
    }
  }
  const auto whole = [=](i64 row) { return floor(left * weight(row) / weights); };
  const auto rest = [=](i64 row) { return left * weight(row) - whole(row) * weights; };
  double spare = floor(left + .5);
  for (i64 row = begin; row < end; row += step)
    if (given[row] == kOpen) spare -= whole(row);
  for (i64 row = begin; row < end; row += step) {
    if (given[row] >= 0) continue;  // full, or of weight 0
    double before = 0;              // rows whose remainders come first
    for (i64 other = begin; other < end; other += step)
      if (given[other] < 0) before += rest(other) > rest(row) || (rest(other) == rest(row) && other < row);
    // Marked as shared, not as full: complement, so that the others still count it.
    given[row] = ~(static_cast<i64>(whole(row)) + (before < spare));
  }
  for (i64 row = begin; row < end; row += step)
    if (given[row] < 0) given[row] = ~given[row];
}

}  // namespace lacuna::sdk
