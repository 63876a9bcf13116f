// The dense probability that falls on a set: one pass over the set's keys, against the dense log-sum-exp.
#include <fmt/format.h>

#include <algorithm>

#include "lacuna/base/error.hpp"
#include "shapes.hpp"

namespace lacuna {

using sdk::i32;
using sdk::i64;

void set_mass(const Attention& a, const std::vector<RowSet>& sets, i32 q_tile, const float* dense_lse, double* mass) {
  check_shapes(a);
  const i64 tiles = (a.q.count + q_tile - 1) / q_tile, rows = a.q.seqs * a.layer.num_qo_heads * tiles;
  if (static_cast<i64>(sets.size()) != rows)
    throw Error({"there are not as many sets as (query head, query tile) rows", fmt::format("{}", rows),
                 fmt::format("{}", sets.size()), "set_mass", ""});
  constexpr i64 kQueries = 64;  // of a tile at a time
  const i64 parts = (q_tile + kQueries - 1) / kQueries;
#pragma omp parallel
  {
    Tile tile;
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < rows * parts; ++task) {
      const i64 row = task / parts, seq = row / tiles / a.layer.num_qo_heads;
      const i32 head = static_cast<i32>(row / tiles % a.layer.num_qo_heads);
      const i64 tile_begin = row % tiles * q_tile, begin = tile_begin + task % parts * kQueries;
      const i64 end = std::min({begin + kQueries, tile_begin + q_tile, a.q.count});
      if (begin >= end) continue;
      const TileQueries q{seq, begin, end, head, 1, seq * a.layer.num_kv_heads + head / a.layer.group()};
      const i64 slot = slot_of_query(a, q.kv_row, begin);
      const KeyList keys = set_keys(sets[static_cast<std::size_t>(row)], slot, slot + q.count(), false);
      const i64 at = (seq * a.layer.num_qo_heads + head) * a.q.count + begin;
      tile.load_queries(a.q, q, query_slots(a, q), a.layer.softmax_scale);
      for (i64 i = 0; i < q.count(); ++i) tile.set_lse(tile.lane(0, i), dense_lse[at + i]);
      double sum[kQueries] = {};
      for (i64 k = 0; k < keys.size(); k += Tile::kKeys) {
        const int n = static_cast<int>(std::min<i64>(Tile::kKeys, keys.size() - k));
        tile.load_keys(a.kv, keys, k, n, false);
        tile.probabilities(0);
        const int width = tile.width(0);
        for (int j = 0; j < n; ++j)
          for (i64 i = 0; i < q.count(); ++i) sum[i] += tile.probability()[j * width + i];
      }
      for (i64 i = 0; i < q.count(); ++i) mass[at + i] = std::min(1., sum[i]);
    }
  }
}

}  // namespace lacuna
