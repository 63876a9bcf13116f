// What a study is made of and what it yields: cells (points of the grid) and rows (one per cell, trace, layer and
// phase).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/metrics/statistics.hpp"
#include "lacuna/pipeline/select.hpp"
#include "lacuna/strategy/instance.hpp"

namespace lacuna {

enum class ReplayPhase { prefill, evict, decode };
const char* name_of(ReplayPhase phase);

/// A point of the study: strategies with every parameter fixed, and a seed.
struct Cell {
  std::string label;  // how tables call it; without budget and seed
  std::optional<Resolved> select, evict, allocate;
  std::uint64_t seed = 0;

  /// Canonical settings, for rows and hashes.
  Json describe() const;
  /// The density that a phase's comparison is made at: of the select role (prefill, decode) or the evict role; none for
  /// methods without one.
  std::optional<double> density(ReplayPhase phase) const;
};

/// Cost of a row, summed over its queries unless said.
struct RowCost {
  double select_bytes = 0, select_flops = 0;  // score, index, rank
  double attend_flops = 0;                    // 4 * head_dim * pairs
  double touched_bytes = 0;                   // K + V fetched: the union over a GQA group, once per query tile
  double kv_bytes = 0,
         dense_kv_bytes =
             0;  // K + V bytes of the pages that the tables reference at the end; dense: had nothing been evicted
  double index_bytes = 0;  // side data at the end
  double seconds = 0;      // wall time of selection and attention on this machine, not a benchmark
};

struct Row {
  int cell = -1;                // index into the cells; -1: the noise floor
  std::string trace, trace_id;  // file name, content hash
  std::string model;
  int layer = 0;
  ReplayPhase phase = ReplayPhase::prefill;
  std::string status = "ok";       // ok | failed
  std::string error;               // when failed
  std::vector<std::string> marks;  // floor, off-budget, dense-layer, sliding-window, clairvoyant, stochastic,
                                   // rank-normalised, query-aware, on-cpu, no-regret, leak
  std::map<std::string, LayerStats> metrics;
  std::int64_t queries = 0, left_out = 0, min_context = 0;  // of the phase; not compared for want of context
  std::optional<double> nominal;                            // density asked for
  double realised_head = 1, realised_union = 1;             // share of the pairs (evict: of the tokens before the cut)
  double read_share = 1;    // pairs read over the pairs that dense attention reads: the product of the roles' budgets
  double target_share = 0;  // the target as a share, 0 without one
  std::int64_t sparse_rows = 0;  // (query head, tile) rows that went through the sparse path
  std::int64_t cut = -1;         // evict: tokens before the cut
  RowCost cost;

  bool marked(const std::string& mark) const;
};

}  // namespace lacuna
