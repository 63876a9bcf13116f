// Dense probabilities of a tile of queries, summed over the queries: what the oracles weigh keys by.
#pragma once

#include "lacuna/attention/attention.hpp"
#include "lacuna/ops/tile.hpp"

namespace lacuna {

/// The tile of `which`, ready for probabilities. dense_lse [seqs, num_qo_heads, queries of the call].
void load_tile(Tile& tile, const Attention& a, const TileQueries& which, const float* dense_lse);

/// mass[h * keys.size() + i] += probability of key i summed over the queries of head h of the tile that see it, in
/// fp64.
void add_column_mass(Tile& tile, const sdk::Paged& kv, const TileQueries& which, const KeyList& keys, double* mass);

/// Slots [begin, end), each seen by every query that comes after it.
KeyList key_range(sdk::i64 begin, sdk::i64 end);

}  // namespace lacuna
