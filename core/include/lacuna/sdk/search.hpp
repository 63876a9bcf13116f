// Searches whose answers stay on the device: nothing is read back between the rounds.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// The largest n in [0, most] that fits, for `count` searches side by side: bisection, then the next `probes` values
/// after the least one that did not fit, since what fits need not be monotone in n. Use:
///   const LargestThatFits search = search_largest(c, count, most, probes);
///   for (i32 round = 0; round < search.rounds(); ++round) {
///     search.propose(c, round);     // tried[i]: the size to try
///     ...                           // fits[i] = whether it fits
///     search.judge(c, round, fits);
///   }                               // best[i]; 0 where nothing fitted
struct LargestThatFits {
  i64 count, most;
  i32 probes, bisections;
  i32 *best, *tried, *above;  // [count]; above: the least size known not to fit

  i32 rounds() const { return bisections + probes; }

  void propose(Context& c, i32 round) const {
    const LargestThatFits s = *this;
    const i32 probe = round - bisections + 1;  // from 1 on: past the bisection
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 n = probe < 1 ? (s.best[i] + s.above[i]) / 2 : s.above[i] + probe;
      s.tried[i] = static_cast<i32>(n < s.most ? n : s.most);
    });
  }
  void judge(Context& c, i32 round, const i32* fits) const {
    const LargestThatFits s = *this;
    const bool bisecting = round < bisections;
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      if (fits[i])
        s.best[i] = s.tried[i];
      else if (bisecting)
        s.above[i] = s.tried[i];
    });
  }
};

/// Starts a search. Workspace: three arrays of i32 [count].
inline LargestThatFits search_largest(Context& c, i64 count, i64 most, i32 probes) {
  LargestThatFits s{count, most, probes, 0, c.workspace<i32>(count), c.workspace<i32>(count), c.workspace<i32>(count)};
  while ((i64{1} << s.bisections) <= most) ++s.bisections;
  i32* const above = s.above;
  c.for_each(count, [=] LACUNA_HD(i64 i) { above[i] = static_cast<i32>(most) + 1; });
  return s;
}

}  // namespace lacuna::sdk
