// What is known of a choice on the host: sets, realised pairs, targets.
#pragma once

#include <vector>

#include "lacuna/pipeline/select.hpp"

namespace lacuna {

/// Adds the sets and costs of a range of tiles. length: [num_kv_heads] cached tokens; `choice.rows` names all tiles.
void account_range(Choice& choice, const sdk::Selection& selection, const sdk::Layer& layer,
                   const std::vector<sdk::i32>& length);

/// Adds the targets of a range's rows (host memory): those that are ranked, or every one of an explicit choice.
void account_targets(Choice& choice, const sdk::Layer& layer, const sdk::Budget& budget, sdk::i32 unit_tokens);

/// Keeps the rows' lists as they were chosen.
void keep_lists(Choice& choice, const sdk::Selection& selection);

}  // namespace lacuna
