#include <algorithm>
#include <numeric>

#include "column_mass.hpp"
#include "lacuna/metrics/matched_oracle.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr i64 kQueries = 64;  // of a tile

/// One KV head: its group's queries against its keys.
class KvHead {
 public:
  KvHead(const Attention& a, i64 kv_row, const float* dense_lse) : a_(a), kv_row_(kv_row), dense_lse_(dense_lse) {}

  i64 parts() const { return (a_.q.count + kQueries - 1) / kQueries; }
  TileQueries part(i64 p) const {
    const i32 group = a_.layer.group();
    return {kv_row_ / a_.layer.num_kv_heads,
            p * kQueries,
            std::min((p + 1) * kQueries, a_.q.count),
            static_cast<i32>(kv_row_ % a_.layer.num_kv_heads) * group,
            group,
            kv_row_};
  }

  /// rank[j]: place of slot j < cut among those slots by mass over all queries, ties to the lower slot.
  std::vector<i64> rank(i64 cut) const {
    std::vector<double> column(static_cast<std::size_t>(cut));
    // Threads share the keys and each goes through the queries in order, so a column's sum does not depend on them.
    constexpr i64 kSlots = 8 * Tile::kKeys;
#pragma omp parallel
    {
      Tile tile;
#pragma omp for schedule(dynamic)
      for (i64 begin = 0; begin < cut; begin += kSlots) {
        const KeyList keys = key_range(begin, std::min(begin + kSlots, cut));
        std::vector<double> mass(keys.slot.size() * static_cast<std::size_t>(a_.layer.group()));
        for (i64 p = 0; p < parts(); ++p) {
          load_tile(tile, a_, part(p), dense_lse_);
          add_column_mass(tile, a_.kv, part(p), keys, mass.data());
        }
        for (std::size_t i = 0; i < mass.size(); ++i)
          column[static_cast<std::size_t>(begin) + i % keys.slot.size()] += mass[i];
      }
    }
    std::vector<i64> order(column.size()), rank(column.size());
    std::iota(order.begin(), order.end(), i64{0});
    std::stable_sort(order.begin(), order.end(), [&](i64 i, i64 j) {
      return column[static_cast<std::size_t>(i)] > column[static_cast<std::size_t>(j)];
    });
    for (std::size_t i = 0; i < order.size(); ++i) rank[static_cast<std::size_t>(order[i])] = static_cast<i64>(i);
    return rank;
  }

  /// f(head of the group, query, sums): sums[b] = mass of the query over the keys of bucket b.
  template <class F>
  void sum_buckets(const std::vector<std::size_t>& bucket, std::size_t buckets, F f) const {
#pragma omp parallel
    {
      Tile tile;
      std::vector<double> sums(buckets * Tile::kLanes);  // [lane of a group of them, bucket]
#pragma omp for schedule(dynamic)
      for (i64 p = 0; p < parts(); ++p) {
        const TileQueries which = part(p);
        load_tile(tile, a_, which, dense_lse_);
        const KeyList keys = key_range(0, a_.kv.length[kv_row_]);
        for (int group = 0; group < tile.groups(); ++group) {
          std::fill(sums.begin(), sums.end(), 0.0);
          const int width = tile.width(group);
          for (i64 begin = 0; begin < keys.size(); begin += Tile::kKeys) {
            const int n = static_cast<int>(std::min<i64>(Tile::kKeys, keys.size() - begin));
            tile.load_keys(a_.kv, keys, begin, n, false);
            tile.probabilities(group);
            for (int j = 0; j < n; ++j) {
              double* sum = sums.data() + bucket[static_cast<std::size_t>(begin + j)];
              const float* probability = tile.probability() + j * width;
              for (int l = 0; l < width; ++l) sum[static_cast<std::size_t>(l) * buckets] += probability[l];
            }
          }
          for (i64 h = 0; h < which.heads; ++h) {
            for (i64 i = 0; i < which.count(); ++i) {
              const i64 lane = tile.lane(h, i) - static_cast<i64>(group) * Tile::kLanes;
              if (lane >= 0 && lane < width)
                f(h, which.begin + i, sums.data() + static_cast<std::size_t>(lane) * buckets);
            }
          }
        }
      }
    }
  }

 private:
  const Attention& a_;
  const i64 kv_row_;
  const float* dense_lse_;
};

}  // namespace

std::vector<std::vector<double>> matched_evict_oracle(const Attention& a, i64 cut, const float* dense_lse,
                                                      const std::vector<std::vector<i64>>& kept) {
  const i64 group = a.layer.group(), count = a.q.count;
  std::vector<std::vector<double>> mass(
      kept.size(), std::vector<double>(static_cast<std::size_t>(a.q.seqs * a.layer.num_qo_heads * count)));
  for (i64 kv_row = 0; kv_row < a.kv.rows; ++kv_row) {
    std::vector<i64> counts;  // distinct numbers of kept tokens
    for (const std::vector<i64>& method : kept) counts.push_back(method[static_cast<std::size_t>(kv_row)]);
    std::sort(counts.begin(), counts.end());
    counts.erase(std::unique(counts.begin(), counts.end()), counts.end());

    // Bucket b: keys that every count from counts[b] on keeps and no smaller one; later tokens are kept by all. The
    // last bucket is kept by none.
    const KvHead head(a, kv_row, dense_lse);
    std::vector<std::size_t> bucket(static_cast<std::size_t>(a.kv.length[kv_row]), 0);
    const std::vector<i64> rank = head.rank(cut);
    for (std::size_t j = 0; j < rank.size(); ++j) {
      bucket[j] = static_cast<std::size_t>(std::upper_bound(counts.begin(), counts.end(), rank[j]) - counts.begin());
    }
    head.sum_buckets(bucket, counts.size() + 1, [&](i64 h, i64 query, double* sums) {
      for (std::size_t b = 1; b < counts.size(); ++b) sums[b] += sums[b - 1];
      for (std::size_t m = 0; m < kept.size(); ++m) {
        const auto b =
            std::lower_bound(counts.begin(), counts.end(), kept[m][static_cast<std::size_t>(kv_row)]) - counts.begin();
        mass[m][static_cast<std::size_t>((kv_row * group + h) * count + query)] = sums[b];
      }
    });
  }
  return mass;
}

}  // namespace lacuna
