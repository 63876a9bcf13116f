// What the attention functions share: checked shapes, and which queries read which row of a selection.
#pragma once

#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/ops/tile.hpp"

namespace lacuna {

/// Throws Error unless layer, cache, queries and selection fit together.
void check_shapes(const Attention& a);

/// check_shapes without the lengths, which may be in device memory.
void check_layout(const Attention& a);

/// Queries that read the same keys, and the selection's row that says which (-1: dense).
struct Reader {
  TileQueries queries;
  sdk::i64 row;
};

/// Every query once, in readers of at most `most_lanes` lanes (but at least 16 queries where there are as many).
std::vector<Reader> split_queries(const Attention& a, sdk::i64 most_lanes);

/// Slot of query i of the call in a KV row.
inline sdk::i64 slot_of_query(const Attention& a, sdk::i64 kv_row, sdk::i64 i) {
  return a.kv.length[kv_row] - a.q.count + i;
}

/// Slots of the reader's queries, for Tile::load_queries.
std::vector<sdk::i32> query_slots(const Attention& a, const TileQueries& queries);

/// Keys of a reader, and the number of (query, key) pairs that it computes over all its heads.
KeyList reader_keys(const Attention& a, const Reader& reader, sdk::i64* pairs);

}  // namespace lacuna
