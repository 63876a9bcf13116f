// The lists of a row while it is being chosen, and how they become a selection.
#pragma once

#include <vector>

#include "lacuna/pipeline/select.hpp"

namespace lacuna {

/// The lists of one row before they are packed into device shape.
struct RowLists {
  std::vector<sdk::i32> pieces, tokens;
  std::vector<float> piece_weights, token_weights;
  sdk::i32 sinks = 0, window = 0, full = 0;
};

OwnedSelection pack(const sdk::Rows& rows, sdk::i32 kv_block, const std::vector<RowLists>& lists, bool weighted);
RowLists unpack(const sdk::Selection& selection, sdk::i64 row);

/// One KV-head row that reads whatever any head of its group chose; log weights are lost. `rows` are the query heads'.
RowLists unite_lists(const std::vector<RowLists>& lists, const sdk::Rows& rows, sdk::i32 kv_head, sdk::i32 group,
                     sdk::i32 tile);

}  // namespace lacuna
