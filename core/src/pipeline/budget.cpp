#include "lacuna/pipeline/budget.hpp"

#include <algorithm>
#include <cmath>

namespace lacuna {
using sdk::i64;

i64 round_half_up(double x) { return static_cast<i64>(std::floor(x + 0.5)); }

i64 capped_pairs(i64 tokens, i64 begin, i64 end) {
  const i64 ramp_end = std::clamp(tokens, begin, end);  // queries below it see fewer than `tokens`
  return (ramp_end * (ramp_end + 1) - begin * (begin + 1)) / 2 + tokens * (end - ramp_end);
}

i64 constant_tokens(double density, i64 prompt_tokens) {
  const double limit = density * static_cast<double>(prompt_tokens * (prompt_tokens + 1) / 2);
  i64 lo = 0, hi = prompt_tokens;
  while (lo < hi) {
    const i64 mid = (lo + hi + 1) / 2;
    if (static_cast<double>(capped_pairs(mid, 0, prompt_tokens)) <= limit)
      lo = mid;
    else
      hi = mid - 1;
  }
  return lo;
}

i64 tile_tokens(const BudgetSpec& budget, i64 constant, i64 visible, i64 unit_tokens) {
  switch (budget.kind) {
    case BudgetSpec::Kind::density:
      return budget.proportional ? round_half_up(budget.value * static_cast<double>(visible)) : constant;
    case BudgetSpec::Kind::tokens: return static_cast<i64>(budget.value);
    case BudgetSpec::Kind::units: return static_cast<i64>(budget.value) * unit_tokens;
    case BudgetSpec::Kind::none:
    case BudgetSpec::Kind::mass: break;
  }
  return visible;
}

i64 cached_tokens_target(const BudgetSpec& budget, i64 cached, i64 unit_tokens) {
  if (budget.kind == BudgetSpec::Kind::density) return round_half_up(budget.value * static_cast<double>(cached));
  return tile_tokens(budget, cached, cached, unit_tokens);
}

i64 ranked_units(i64 target_pairs, i64 forced_pairs, i64 forced_units, i64 unit_tokens, i64 queries, i64 min_units) {
  const i64 room = std::max<i64>(0, target_pairs - forced_pairs) / (unit_tokens * queries);
  return std::max(room, std::max<i64>(1, min_units) - forced_units);
}

}  // namespace lacuna
