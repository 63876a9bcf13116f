#include "lacuna/pipeline/budget.hpp"

namespace lacuna {
using sdk::i64;

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

TargetRule target_rule(const BudgetSpec& budget, i64 prompt_tokens, sdk::i32 unit_tokens) {
  TargetRule rule{budget.kind, budget.value, prompt_tokens >= 0, budget.proportional, 0, unit_tokens};
  if (rule.by_tile && rule.kind == BudgetSpec::Kind::density)
    rule.constant = constant_tokens(budget.value, prompt_tokens);
  return rule;
}

}  // namespace lacuna
