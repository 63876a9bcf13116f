// Targets: from a budget as a scenario gives it to (query, key) pairs of each row. The rounding rules stand in
// docs/metrics.md.
#pragma once

#include <vector>

#include "lacuna/sdk/types.hpp"
#include "lacuna/strategy/instance.hpp"

namespace lacuna {

/// floor(x + 0.5).
sdk::i64 round_half_up(double x);

/// The largest K with sum over the prompt's queries q of min(K, q + 1) <= density * sum of (q + 1).
sdk::i64 constant_tokens(double density, sdk::i64 prompt_tokens);

/// Sum over queries at slots [begin, end) of min(tokens, slot + 1).
sdk::i64 capped_pairs(sdk::i64 tokens, sdk::i64 begin, sdk::i64 end);

/// Target tokens K_t of a prefill tile whose last query sees `visible` tokens; `constant` is constant_tokens of the
/// prompt. Without a budget, or for top-p: `visible`.
sdk::i64 tile_tokens(const BudgetSpec& budget, sdk::i64 constant, sdk::i64 visible, sdk::i64 unit_tokens);

/// Target tokens of a decode step over `cached` tokens, or of an eviction from `cached` tokens.
sdk::i64 cached_tokens_target(const BudgetSpec& budget, sdk::i64 cached, sdk::i64 unit_tokens);

/// Units that a row ranks beside its forced ones: floor((target - forced) / (unit_tokens * queries)), raised so that
/// the row has at least max(1, min_units) units.
sdk::i64 ranked_units(sdk::i64 target_pairs, sdk::i64 forced_pairs, sdk::i64 forced_units, sdk::i64 unit_tokens,
                      sdk::i64 queries, sdk::i64 min_units);

}  // namespace lacuna
