// A budget as a scenario gives it.
#pragma once

namespace lacuna {

/// `density`: share of the tokens (or pairs); `tokens`, `units`: counts; `mass`: top-p.
struct BudgetSpec {
  enum class Kind { none, density, tokens, units, mass } kind = Kind::none;
  double value = 0;
  bool proportional = false;  // prefill: shape = "proportional"
};

}  // namespace lacuna
