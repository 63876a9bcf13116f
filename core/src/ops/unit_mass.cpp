// True softmax mass of every unit: two passes over the keys, log-sum-exp first.
#include <algorithm>
#include <vector>

#include "lacuna/ops/cpu_ops.hpp"
#include "visible.hpp"

namespace lacuna {

using sdk::i32;
using sdk::i64;

void CpuOps::unit_mass(const sdk::Queries& q, sdk::Scores& out) {
  const sdk::Rows& rows = out.rows;
  const sdk::Paged& kv = call_.kv;
  const i32 group = call_.layer.group(), heads = rows.per_query_head ? 1 : group;
  constexpr i64 kQueries = 64;  // of a tile at a time
  double pairs = 0;
#pragma omp parallel reduction(+ : pairs)
  {
    Tile tile;
    std::vector<double> keys_sum, units;
#pragma omp for schedule(dynamic)
    for (i64 r = rows.count() - 1; r >= 0; --r) {
      units.assign(static_cast<std::size_t>(out.units), 0.);
      TileQueries which{rows.seq_of(r), 0, 0, rows.head_of(r) * heads, heads, rows.kv_row(r, call_.layer.num_kv_heads)};
      i64 visible = 0;
      for (which.begin = rows.query_begin(r); which.begin < rows.query_end(r); which.begin = which.end) {
        which.end = std::min(rows.query_end(r), which.begin + kQueries);
        const std::vector<i32> slots = last_visible(kv, q, which);
        visible = std::max<i64>(visible, slots.back() + 1);
        const KeyList keys = dense_keys(kv, which.kv_row, 0, slots.back() + 1, 0);
        pairs += visible_pairs(slots) * heads;
        tile.load_queries(q, which, slots, call_.layer.softmax_scale);
        for_each_block(tile, kv, keys, 0, keys.size(), [&](i64, int) {
          for (int g = 0; g < tile.groups(); ++g) tile.online(g);
        });
        tile.finish();
        keys_sum.assign(static_cast<std::size_t>(heads * keys.size()), 0.);
        for_each_block(tile, kv, keys, 0, keys.size(), [&](i64 k, int) {
          for (int g = 0; g < tile.groups(); ++g) {
            tile.probabilities(g);
            tile.reduce(g, false, keys_sum.data() + k, keys.size());
          }
        });
        for (i64 h = 0; h < heads; ++h)
          for (i64 k = 0; k < keys.size(); ++k)
            if (const i64 unit = k / out.unit_tokens; unit < out.units)
              units[static_cast<std::size_t>(unit)] += keys_sum[static_cast<std::size_t>(h * keys.size() + k)];
      }
      const i64 seen = std::min<i64>(out.units, (visible + out.unit_tokens - 1) / out.unit_tokens);
      for (i64 u = 0; u < seen; ++u)
        out.value[r * out.stride + u] = static_cast<float>(units[static_cast<std::size_t>(u)]);
    }
  }
  cost_.flops += 4. * pairs * q.head_dim;
  cost_.bytes += 2. * (key_bytes(kv) + query_bytes(q)) + 4. * static_cast<double>(rows.count() * out.units);
}

}  // namespace lacuna
