// Targets: from a budget as a scenario gives it to (query, key) pairs of each row, on host and device alike. The
// rounding rules stand in docs/metrics.md.
#pragma once

#include "lacuna/sdk/types.hpp"
#include "lacuna/strategy/budget_spec.hpp"

namespace lacuna {

/// floor(x + 0.5).
LACUNA_HD inline sdk::i64 round_half_up(double x) { return static_cast<sdk::i64>(floor(x + 0.5)); }

/// x * y rounded by itself: never fused with what is added to it, so that host and device agree.
LACUNA_HD inline double product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

/// Sum over queries at slots [begin, end) of min(tokens, slot + 1).
LACUNA_HD inline sdk::i64 capped_pairs(sdk::i64 tokens, sdk::i64 begin, sdk::i64 end) {
  // Queries below it see fewer than `tokens`.
  const sdk::i64 ramp_end = tokens < begin ? begin : tokens > end ? end : tokens;
  return (ramp_end * (ramp_end + 1) - begin * (begin + 1)) / 2 + tokens * (end - ramp_end);
}

/// The largest K with sum over the prompt's queries q of min(K, q + 1) <= density * sum of (q + 1).
sdk::i64 constant_tokens(double density, sdk::i64 prompt_tokens);

/// A row's target before allocation, ready for a kernel.
struct TargetRule {
  BudgetSpec::Kind kind = BudgetSpec::Kind::none;
  double value = 0;
  bool by_tile = false;       // prefill: constant or proportional over the tiles
  bool proportional = false;  // prefill, density
  sdk::i64 constant = 0;      // prefill, density: constant_tokens of the prompt
  sdk::i32 unit_tokens = 1;

  /// Target tokens of a row whose last query sees `visible` tokens. Without a budget, or for top-p: `visible`.
  LACUNA_HD sdk::i64 tokens(sdk::i64 visible) const {
    switch (kind) {
      case BudgetSpec::Kind::density:
        return by_tile && !proportional ? constant : round_half_up(product(value, static_cast<double>(visible)));
      case BudgetSpec::Kind::tokens: return static_cast<sdk::i64>(value);
      case BudgetSpec::Kind::units: return static_cast<sdk::i64>(value) * unit_tokens;
      case BudgetSpec::Kind::none:
      case BudgetSpec::Kind::mass: break;
    }
    return visible;
  }
  /// Whether a number of tokens or pairs is given.
  LACUNA_HD bool limited() const {
    return kind == BudgetSpec::Kind::density || kind == BudgetSpec::Kind::tokens || kind == BudgetSpec::Kind::units;
  }
};

/// The rule of a prefill over `prompt_tokens`, or of a decode step or an eviction (prompt_tokens < 0).
TargetRule target_rule(const BudgetSpec& budget, sdk::i64 prompt_tokens, sdk::i32 unit_tokens);

/// Units that a row ranks beside its forced ones: floor((target - forced) / (unit_tokens * queries)), raised so that
/// the row has at least max(1, min_units) units.
LACUNA_HD inline sdk::i64 ranked_units(sdk::i64 target_pairs, sdk::i64 forced_pairs, sdk::i64 forced_units,
                                       sdk::i64 unit_tokens, sdk::i64 queries, sdk::i64 min_units) {
  const sdk::i64 left = target_pairs - forced_pairs;
  const sdk::i64 fitting = left > 0 ? left / (unit_tokens * queries) : 0;
  const sdk::i64 least = (min_units > 1 ? min_units : 1) - forced_units;
  return fitting > least ? fitting : least;
}

}  // namespace lacuna
