// The probabilities that attention computed, summed by key: exp(logit - lse) over the cells that it read.
#include <algorithm>
#include <vector>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "visible.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr i64 kQueries = 64;  // of a tile at most

// Adds the mass of some queries, all reading the same keys, to sums [heads, stride]; returns the pairs computed.
double add_mass(const sdk::Call& call, const sdk::Attended& attended, const TileQueries& which, i64 selection_row,
                Tile& tile, std::vector<double>& list_sums, double* sums, i64 stride) {
  const sdk::Queries& q = attended.queries;
  const std::vector<i32> slots = last_visible(call.kv, q, which);
  const i64 first = std::max<i64>(0, slots.front()), last = slots.back() + 1;
  if (last == 0) return 0;
  const KeyList keys = selection_row < 0 ? dense_keys(call.kv, which.kv_row, first, last, call.layer.sliding_window)
                                         : set_keys(expand_row(*attended.read, selection_row, last), first, last, true);
  tile.load_queries(q, which, slots, call.layer.softmax_scale);
  for (i64 h = 0; h < which.heads; ++h)
    for (i64 i = 0; i < which.count(); ++i)
      tile.set_lse(tile.lane(h, i),
                   attended.lse[(which.seq * q.heads + which.head_begin + h) * q.count + which.begin + i]);
  list_sums.assign(static_cast<std::size_t>(which.heads * keys.size()), 0.);
  for_each_block(tile, call.kv, keys, 0, keys.size(), [&](i64 k, int) {
    for (int g = 0; g < tile.groups(); ++g) {
      tile.probabilities(g);
      tile.reduce(g, false, list_sums.data() + k, keys.size());
    }
  });
  for (i64 h = 0; h < which.heads; ++h)
    for (i64 k = 0; k < keys.size(); ++k)
      if (const i64 slot = keys.slot[static_cast<std::size_t>(k)]; slot < stride)
        sums[h * stride + slot] += list_sums[static_cast<std::size_t>(h * keys.size() + k)];
  return static_cast<double>(keys.size() * which.count() * which.heads);
}

}  // namespace

i32 CpuOps::read_mass(const sdk::Attended& attended, float* columns, i64 stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const sdk::Queries& q = attended.queries;
    const sdk::Selection* read = attended.read;
    const i32 group = call_.layer.group();
    // One query: the group's heads share a pass where they read the same. Many: a head fills the lanes by itself.
    const i32 heads = q.count < kLaneStep && !(read && read->rows.per_query_head) ? group : 1;
    const i64 tiles = read ? read->rows.tiles : 1;
    double pairs = 0;
#pragma omp parallel reduction(+ : pairs)
    {
      Tile tile;
      std::vector<double> sums(static_cast<std::size_t>(heads * stride)), list_sums;
#pragma omp for schedule(dynamic)
      for (i64 task = 0; task < static_cast<i64>(q.seqs) * q.heads / heads; ++task) {
        const i64 first_head = task * heads;
        TileQueries which{first_head / q.heads, 0, 0, static_cast<i32>(first_head % q.heads), heads,
                          first_head / group};
        std::fill(sums.begin(), sums.end(), 0.);
        for (i64 t = 0; t < tiles; ++t) {
          const i64 row = !read ? -1 : (read->rows.per_query_head ? first_head : which.kv_row) * tiles + t;
          const i64 begin = read ? read->rows.query_begin(row) : 0, end = read ? read->rows.query_end(row) : q.count;
          for (which.begin = begin; which.begin < end; which.begin = which.end) {
            which.end = std::min(end, which.begin + kQueries);
            pairs += add_mass(call_, attended, which, row, tile, list_sums, sums.data(), stride);
          }
        }
        float* out = columns + first_head * stride;
        for (i64 i = 0; i < heads * stride; ++i) out[i] += static_cast<float>(sums[static_cast<std::size_t>(i)]);
      }
    }
    cost_.flops += 2. * pairs * q.head_dim;
    cost_.bytes += pairs / static_cast<double>(std::max<i64>(1, std::min(q.count, kQueries)) * heads) *
                       call_.kv.head_dim * static_cast<double>(sdk::size_of(call_.kv.dtype)) +
                   query_bytes(q) + 8. * static_cast<double>(q.seqs) * q.heads * static_cast<double>(stride);
  });
}

}  // namespace lacuna
