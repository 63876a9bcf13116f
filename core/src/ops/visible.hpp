// Where the queries of an operation sit in a KV row: by original position, whether they are cached or not.
#pragma once

#include <vector>

#include "lacuna/ops/tile.hpp"

namespace lacuna {

/// The slot of each query's last visible key, -1 where it sees none.
inline std::vector<sdk::i32> last_visible(const sdk::Paged& kv, const sdk::Queries& q, const TileQueries& which) {
  std::vector<sdk::i32> out;
  for (sdk::i64 i = which.begin; i < which.end; ++i) out.push_back(kv.visible(which.kv_row, q.first_position + i) - 1);
  return out;
}

/// f(first key of the block, keys) for every block of a list, after loading it.
template <class F>
void for_each_block(Tile& tile, const sdk::Paged& kv, const KeyList& keys, sdk::i64 begin, sdk::i64 end, F f) {
  for (sdk::i64 k = begin; k < end; k += Tile::kKeys) {
    const int n = static_cast<int>(std::min<sdk::i64>(Tile::kKeys, end - k));
    tile.load_keys(kv, keys, k, n, false);
    f(k, n);
  }
}

/// Pairs that these queries see, by their slots.
inline double visible_pairs(const std::vector<sdk::i32>& slots) {
  double sum = 0;
  for (const sdk::i32 s : slots) sum += s + 1;
  return sum;
}

/// Bytes of the keys of a cache.
inline double key_bytes(const sdk::Paged& kv) {
  double tokens = 0;
  for (sdk::i64 row = 0; row < kv.rows; ++row) tokens += kv.length[row];
  return tokens * kv.head_dim * static_cast<double>(sdk::size_of(kv.dtype));
}

inline double query_bytes(const sdk::Queries& q) {
  return static_cast<double>(q.seqs) * q.heads * static_cast<double>(q.count) * q.head_dim *
         static_cast<double>(sdk::size_of(q.dtype));
}

}  // namespace lacuna
