// What a strategy's results must satisfy. A violation throws Error naming strategy, role, layer, head and tile.
#pragma once

#include <string>

#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Who is being checked, for the message.
struct Culprit {
  std::string strategy, role;
  int layer = 0;
};

/// No NaN; kind mass: no negative value and no row sum above 1 + 1e-3 times `row_mass` (the queries a row sums over).
void check_scores(const Culprit& who, const sdk::Scores& scores, sdk::ScoreKind kind, double row_mass);
/// Rules known, no negative target, and the sum of pairs over ranked rows at most `total` (what went in).
void check_budget(const Culprit& who, const sdk::Budget& budget, sdk::i64 total);
/// Counts within capacity; pieces and tokens unique, in range, causal (a tile's last query sees them); exact parts not
/// negative; log weights finite; every row with a visible token reads at least one. `visible[row]`: slots its last
/// query sees.
void check_selection(const Culprit& who, const sdk::Selection& selection, const sdk::i64* visible);
/// Tokens of each KV head ascending or not, but unique and below length[head]; at least one where anything is cached.
void check_kept(const Culprit& who, const sdk::Kept& kept, const sdk::i32* length);
/// What a rewrite left behind, all host memory: no kept token whose key or value is not finite (bad [rows, slots] by
/// place in `kept`), channels of cached tokens, marked 0 or 1.
void check_rewrite(const Culprit& who, const sdk::Rewrite& rewrite, const sdk::u8* bad, const sdk::i32* length);

}  // namespace lacuna
