#include "lacuna/metrics/matched_oracle.hpp"

#include <algorithm>
#include <iterator>
#include <map>

#include "column_mass.hpp"
#include "tile_columns.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

/// A key for every query of the tile that sees it and may choose it.
struct Column {
  double mass;
  i64 cost;  // those queries, > 0
  i64 slot;
  double density = mass / static_cast<double>(cost);
};

bool denser(const Column& a, const Column& b) {
  return a.density != b.density ? a.density > b.density : a.slot < b.slot;
}

/// The fractional knapsack over columns sorted by density, for every capacity.
class Frontier {
 public:
  explicit Frontier(const std::vector<Column>& sorted) : cost_(1, 0), mass_(1, 0.0) {
    cost_.reserve(sorted.size() + 1);
    mass_.reserve(sorted.size() + 1);
    for (const Column& column : sorted) {
      cost_.push_back(cost_.back() + column.cost);
      mass_.push_back(mass_.back() + column.mass);
    }
  }
  double best(i64 pairs) const {
    const auto next = static_cast<std::size_t>(std::upper_bound(cost_.begin(), cost_.end(), pairs) - cost_.begin());
    if (next == cost_.size()) return mass_.back();
    const double part =
        static_cast<double>(pairs - cost_[next - 1]) / static_cast<double>(cost_[next] - cost_[next - 1]);
    return mass_[next - 1] + part * (mass_[next] - mass_[next - 1]);
  }
  double total_mass() const { return mass_.back(); }

 private:
  std::vector<i64> cost_;  // of the first i columns
  std::vector<double> mass_;
};

/// Answers every method's question about the rows of one tile and KV head from one pass over their probabilities.
class TileOracle {
 public:
  TileOracle(Tile& tile, const Attention& a, const TileQueries& which, const float* dense_lse)
      : tile_(tile),
        a_(a),
        which_(which),
        first_(a.kv.length[which.kv_row] - a.q.count + which.begin),
        end_(first_ + which.count()) {
    load_tile(tile_, a_, which_, dense_lse);
    std::vector<double> mass(static_cast<std::size_t>(which_.heads * end_));
    add_column_mass(tile_, a_.kv, which_, key_range(0, end_), mass.data());
    for (i64 h = 0; h < which_.heads; ++h) {
      std::vector<Column>& columns = columns_.emplace_back();
      columns.reserve(static_cast<std::size_t>(end_));
      for (i64 j = 0; j < end_; ++j)
        columns.push_back({mass[static_cast<std::size_t>(h * end_ + j)], all().cost(j), j});
      std::sort(columns.begin(), columns.end(), denser);
      free_.emplace_back(columns);
    }
    outside_.resize(static_cast<std::size_t>(which_.heads));
  }

  double best(i64 head, i64 pairs, i32 sinks, i32 window) {
    const Frontier& free = free_[static_cast<std::size_t>(head)];
    const double without = free.best(pairs);
    if (window <= 0) return without;  // sinks alone are columns
    auto& known = outside_[static_cast<std::size_t>(head)];
    auto it = known.find({sinks, window});
    if (it == known.end()) it = known.emplace(std::pair(sinks, window), Frontier(outside(head, sinks, window))).first;
    const Frontier& rest = it->second;
    const i64 exact_pairs = all().total_cost() - but(sinks, window).total_cost();
    if (pairs < exact_pairs) return without;
    return std::max(without, free.total_mass() - rest.total_mass() + rest.best(pairs - exact_pairs));
  }

 private:
  TileColumns all() const { return {first_, end_}; }
  TileColumns but(i32 sinks, i32 window) const { return {first_, end_, sinks, window}; }

  /// [heads, cut keys]: their mass inside the window.
  const std::vector<double>& window_mass(i32 window) {
    auto it = window_mass_.find(window);
    if (it == window_mass_.end()) {
      KeyList keys = key_range(but(0, window).cut(), but(0, window).past());
      for (std::size_t i = 0; i < keys.slot.size(); ++i) keys.until[i] = keys.slot[i] + window;
      std::vector<double> mass(static_cast<std::size_t>(which_.heads) * keys.slot.size());
      add_column_mass(tile_, a_.kv, which_, keys, mass.data());
      it = window_mass_.emplace(window, std::move(mass)).first;
    }
    return it->second;
  }

  /// The columns less the cells of `sinks` and `window`, sorted. Only the cut keys have to be weighed and sorted anew:
  /// at most as many as the tile has queries.
  std::vector<Column> outside(i64 head, i32 sinks, i32 window) {
    const TileColumns rest = but(sinks, window);
    const i64 begin = rest.cut(), end = rest.past();
    const std::vector<double>& inside = window_mass(window);
    std::vector<Column> whole, cut, merged;
    for (const Column& column : columns_[static_cast<std::size_t>(head)]) {
      if (column.slot < sinks || column.slot >= end) continue;
      if (column.slot < begin) {
        whole.push_back(column);
        continue;
      }
      const double mass = column.mass - inside[static_cast<std::size_t>(head * (end - begin) + column.slot - begin)];
      cut.push_back({std::max(0.0, mass), rest.cost(column.slot), column.slot});
    }
    std::sort(cut.begin(), cut.end(), denser);
    merged.reserve(whole.size() + cut.size());
    std::merge(whole.begin(), whole.end(), cut.begin(), cut.end(), std::back_inserter(merged), denser);
    return merged;
  }

  Tile& tile_;
  const Attention& a_;
  const TileQueries which_;
  const i64 first_, end_;                     // slots of the tile's queries
  std::vector<std::vector<Column>> columns_;  // by head, sorted
  std::vector<Frontier> free_;
  std::vector<std::map<std::pair<i32, i32>, Frontier>> outside_;  // by head, sinks and window
  std::map<i32, std::vector<double>> window_mass_;
};

i64 tiles_of(const Attention& a, i32 q_tile) { return (a.q.count + q_tile - 1) / q_tile; }

}  // namespace

OracleRequest oracle_request(const Attention& a, const std::vector<RowSet>& sets, i32 q_tile) {
  const i64 tiles = tiles_of(a, q_tile), group = a.layer.group();
  OracleRequest request;
  request.pairs.resize(sets.size());
  request.exact_sinks.resize(sets.size());
  request.exact_window.resize(sets.size());
#pragma omp parallel for schedule(dynamic, 64)
  for (std::size_t row = 0; row < sets.size(); ++row) {
    const i64 head = static_cast<i64>(row) / tiles, tile = static_cast<i64>(row) % tiles;
    const i64 first = a.kv.length[head / group] - a.q.count;  // sequences hold whole groups, so this is the KV row
    request.pairs[row] = sets[row].pairs(first + tile * q_tile, first + std::min((tile + 1) * q_tile, a.q.count));
    request.exact_sinks[row] = sets[row].exact_sinks;
    request.exact_window[row] = sets[row].exact_window;
  }
  return request;
}

std::vector<std::vector<double>> matched_oracle(const Attention& a, i32 q_tile, const float* dense_lse,
                                                const std::vector<OracleRequest>& requests) {
  const i64 tiles = tiles_of(a, q_tile), heads = a.layer.num_qo_heads;
  const i32 group = a.layer.group();
  std::vector<std::vector<double>> mass(requests.size(),
                                        std::vector<double>(static_cast<std::size_t>(a.q.seqs * heads * tiles)));
#pragma omp parallel
  {
    Tile tile;
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < a.kv.rows * tiles; ++task) {
      // The longest rows first, so that no thread is left alone with one at the end.
      const i64 kv_row = task % a.kv.rows, t = tiles - 1 - task / a.kv.rows;
      const TileQueries which{kv_row / a.layer.num_kv_heads,
                              t * q_tile,
                              std::min<i64>((t + 1) * q_tile, a.q.count),
                              static_cast<i32>(kv_row % a.layer.num_kv_heads) * group,
                              group,
                              kv_row};
      TileOracle oracle(tile, a, which, dense_lse);
      for (i64 h = 0; h < group; ++h) {
        const auto row = static_cast<std::size_t>((kv_row * group + h) * tiles + t);
        for (std::size_t m = 0; m < requests.size(); ++m) {
          const OracleRequest& request = requests[m];
          const bool exact = !request.exact_window.empty();
          mass[m][row] = oracle.best(h, request.pairs[row], exact ? request.exact_sinks[row] : 0,
                                     exact ? request.exact_window[row] : 0);
        }
      }
    }
  }
  return mass;
}

void regret_of_rows(const std::vector<double>& oracle, const double* mass_kept, i32 heads, i64 queries, i32 q_tile,
                    double* regret) {
  const i64 tiles = (queries + q_tile - 1) / q_tile;
  for (i64 row = 0; row < heads * tiles; ++row) {
    const i64 begin = row % tiles * q_tile, end = std::min(begin + q_tile, queries);
    const i64 first = row / tiles * queries;
    double kept = 0;
    for (i64 i = begin; i < end; ++i) kept += mass_kept[first + i];
    const double each = (oracle[static_cast<std::size_t>(row)] - kept) / static_cast<double>(end - begin);
    std::fill(regret + first + begin, regret + first + end, each);
  }
}

}  // namespace lacuna
