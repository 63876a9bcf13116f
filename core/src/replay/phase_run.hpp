// One cell through one phase of one layer: what it produced, before it is compared.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "lacuna/replay/layer_replay.hpp"
#include "lacuna/replay/row.hpp"

namespace lacuna {

struct PhaseRun {
  std::vector<float> out, lse;                        // [num_qo_heads, queries(, head_dim)]
  std::vector<float> unweighted_out, unweighted_lse;  // where log weights were used
  std::vector<RowSet> sets;                           // per (query head, tile), original positions
  sdk::i32 q_tile = 1;
  bool other_keys = false;  // what was read is not what dense attention has there: positions = compacted, or rewritten
  std::vector<sdk::i64> kept;  // eviction in one cut: tokens kept before it, per KV head
  AttentionWork work;
  RowCost cost;
  std::vector<std::string> marks;
  double realised_head = 1, realised_union = 1, target_share = 0, read_share = 1;
};

struct PhaseOptions {
  bool poison = false;  // queries beyond a call's are NaN (freed cache slots: LayerReplay's own)
  bool keep_lists = false, keep_scores = false;      // in what the functions below see
  std::function<void(const Step&)> on_step;          // prefill, a read after the cut, or each decode step, in order
  std::function<void(const Eviction&)> on_eviction;  // at the cut
  CarriedArrays* carried = nullptr;                  // of the cell in this phase; none: the layer stands alone
  const double* entropy = nullptr;                   // [num_layers], see sdk::LayerBudget
};

/// The roles that act in the phase, an allocator only where it serves one of them.
Roles roles_of(const Cell& cell, ReplayPhase phase);

/// Whether nvcc compiled every strategy of the cell.
bool runs_on_device(const Cell& cell);

/// Positions of a phase's queries; `cut` counts in evict alone.
struct PhaseQueries {
  sdk::i64 begin, end;
};
PhaseQueries phase_queries(const TraceInfo& info, ReplayPhase phase, const std::string& cut);

/// Runs the phase; the contract is always checked. Throws Error.
PhaseRun run_phase(LayerReplay& layer, const TraceInfo& info, const Cell& cell, ReplayPhase phase, PhaseQueries queries,
                   const PhaseOptions& options);

/// mass_kept [num_qo_heads, queries]: dense probability over what was read; 1 in a layer with a sliding window.
std::vector<double> mass_of(LayerReplay& layer, PhaseQueries queries, const PhaseRun& run);

}  // namespace lacuna
