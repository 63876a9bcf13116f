// Softmax mass of some queries by key and by distance. The rows' log-sum-exp comes from a first pass; in the second
// every task owns the columns of some keys, or all the diagonals of a head, so that sums have one order.
#include <algorithm>
#include <vector>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "visible.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr i64 kQueries = 64;      // of a tile
constexpr i64 kColumnKeys = 512;  // of a task of the second pass

struct Window {
  const sdk::Paged& kv;
  const sdk::Queries& q;
  const sdk::Layer& layer;
  std::vector<double> lse;  // [seqs, heads, count]

  i64 tiles() const { return (q.count + kQueries - 1) / kQueries; }
  TileQueries group(i64 kv_row, i64 tile) const {
    const i32 group = layer.group(), head = static_cast<i32>(kv_row % layer.num_kv_heads) * group;
    return {
        kv_row / layer.num_kv_heads, tile * kQueries, std::min(q.count, (tile + 1) * kQueries), head, group, kv_row};
  }
  i64 at(const TileQueries& t, i64 h, i64 i) const {
    return (t.seq * q.heads + t.head_begin + h) * q.count + t.begin + i;
  }
  void load(Tile& tile, const TileQueries& t, const std::vector<i32>& slots) const {
    tile.load_queries(q, t, slots, layer.softmax_scale);
    for (i64 h = 0; h < t.heads; ++h)
      for (i64 i = 0; i < t.count(); ++i) tile.set_lse(tile.lane(h, i), lse[static_cast<std::size_t>(at(t, h, i))]);
  }
};

double find_lse(Window& w) {
  double pairs = 0;
#pragma omp parallel reduction(+ : pairs)
  {
    Tile tile;
#pragma omp for schedule(dynamic) collapse(2)
    for (i64 row = 0; row < w.kv.rows; ++row)
      for (i64 t = 0; t < w.tiles(); ++t) {
        const TileQueries which = w.group(row, t);
        const std::vector<i32> slots = last_visible(w.kv, w.q, which);
        pairs += visible_pairs(slots) * which.heads;
        const KeyList keys = dense_keys(w.kv, row, 0, slots.back() + 1, 0);
        tile.load_queries(w.q, which, slots, w.layer.softmax_scale);
        for_each_block(tile, w.kv, keys, 0, keys.size(), [&](i64, int) {
          for (int g = 0; g < tile.groups(); ++g) tile.online(g);
        });
        const std::vector<double>& lse = tile.finish();
        for (i64 h = 0; h < which.heads; ++h)
          for (i64 i = 0; i < which.count(); ++i)
            w.lse[static_cast<std::size_t>(w.at(which, h, i))] = lse[static_cast<std::size_t>(tile.lane(h, i))];
      }
  }
  return pairs;
}

void sum_columns(const Window& w, sdk::Reduce reduce, float* columns, i64 stride) {
  const i64 chunks = (w.kv.max_length + kColumnKeys - 1) / kColumnKeys;
  const i32 heads = w.layer.group();
#pragma omp parallel
  {
    Tile tile;
    std::vector<double> sums(static_cast<std::size_t>(heads * kColumnKeys));
#pragma omp for schedule(dynamic) collapse(2)
    for (i64 row = 0; row < w.kv.rows; ++row)
      for (i64 chunk = 0; chunk < chunks; ++chunk) {
        const i64 begin = chunk * kColumnKeys, end = std::min<i64>(w.kv.length[row], begin + kColumnKeys);
        if (begin >= end) continue;
        const KeyList keys = dense_keys(w.kv, row, 0, end, 0);
        std::fill(sums.begin(), sums.end(), 0.);
        for (i64 t = 0; t < w.tiles(); ++t) {
          const TileQueries which = w.group(row, t);
          const std::vector<i32> slots = last_visible(w.kv, w.q, which);
          const i64 last = std::min<i64>(end, slots.back() + 1);
          if (last <= begin) continue;
          w.load(tile, which, slots);
          for_each_block(tile, w.kv, keys, begin, last, [&](i64 k, int) {
            for (int g = 0; g < tile.groups(); ++g) {
              tile.probabilities(g);
              tile.reduce(g, reduce == sdk::Reduce::max, sums.data() + (k - begin), kColumnKeys);
            }
          });
        }
        const double divisor = reduce == sdk::Reduce::mean ? static_cast<double>(w.q.count) : 1.;
        const TileQueries which = w.group(row, 0);
        for (i64 h = 0; h < heads; ++h)
          for (i64 k = begin; k < std::min(end, stride); ++k)
            columns[(which.seq * w.q.heads + which.head_begin + h) * stride + k] =
                static_cast<float>(sums[static_cast<std::size_t>(h * kColumnKeys + k - begin)] / divisor);
      }
  }
}

void sum_diagonals(const Window& w, sdk::Reduce reduce, float* diagonals, i64 stride) {
#pragma omp parallel
  {
    Tile tile;
    std::vector<double> sums(static_cast<std::size_t>(stride));
#pragma omp for schedule(dynamic)
    for (i64 head = 0; head < static_cast<i64>(w.q.seqs) * w.q.heads; ++head) {
      const i64 kv_row = head / w.layer.group();
      std::fill(sums.begin(), sums.end(), 0.);
      for (i64 t = 0; t < w.tiles(); ++t) {
        TileQueries which = w.group(kv_row, t);
        which.head_begin = static_cast<i32>(head % w.q.heads);
        which.heads = 1;
        const std::vector<i32> slots = last_visible(w.kv, w.q, which);
        const KeyList keys = dense_keys(w.kv, kv_row, 0, slots.back() + 1, 0);
        w.load(tile, which, slots);
        const i64 position = w.q.first_position + which.begin;
        for_each_block(tile, w.kv, keys, 0, keys.size(), [&](i64 k, int n) {
          tile.probabilities(0);
          for (int j = 0; j < n; ++j) {
            const float* p = tile.probability() + j * tile.width(0);
            const i64 offset = position - w.kv.position_of(kv_row, k + j);
            for (i64 i = std::max<i64>(0, -offset); i < std::min(which.count(), stride - offset); ++i) {
              double& sum = sums[static_cast<std::size_t>(offset + i)];
              sum = reduce == sdk::Reduce::max ? std::max<double>(sum, p[i]) : sum + p[i];
            }
          }
        });
      }
      const double divisor = reduce == sdk::Reduce::mean ? static_cast<double>(w.q.count) : 1.;
      for (i64 o = 0; o < stride; ++o)
        diagonals[head * stride + o] = static_cast<float>(sums[static_cast<std::size_t>(o)] / divisor);
    }
  }
}

}  // namespace

i32 CpuOps::window_mass(const sdk::Queries& q, sdk::Reduce reduce, float* columns, float* diagonals, i64 stride,
                        sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const i64 rows = static_cast<i64>(q.seqs) * q.heads;
    std::fill(columns, columns + rows * stride, 0.f);
    if (diagonals) std::fill(diagonals, diagonals + rows * stride, 0.f);
    if (q.count == 0) return;
    Window w{call_.kv, q, call_.layer, std::vector<double>(static_cast<std::size_t>(rows * q.count))};
    const double pairs = find_lse(w);
    sum_columns(w, reduce, columns, stride);
    if (diagonals) sum_diagonals(w, reduce, diagonals, stride);
    const double passes = diagonals ? 3 : 2;
    cost_.flops += passes * 2. * pairs * q.head_dim;
    cost_.bytes += passes * (key_bytes(call_.kv) + query_bytes(q)) +
                   (diagonals ? 2. : 1.) * 4. * static_cast<double>(rows * stride);
  });
}

}  // namespace lacuna
