// Selections in scratch memory, and their copies on the host.
#pragma once

#include <memory>
#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/pipeline/runtime.hpp"
#include "lacuna/pipeline/select.hpp"

namespace lacuna {

/// All rows empty, room as given. Beyond the lists' ends lie guard words, which HostSelection::check_guards looks at.
sdk::Selection make_selection(Scratch& scratch, const sdk::Rows& rows, sdk::i32 kv_block, sdk::i64 piece_capacity,
                              sdk::i64 token_capacity, bool weighted);
/// Room for `capacity` extra tokens a row, none of them there yet.
void give_extras(Scratch& scratch, sdk::Selection& selection, sdk::i64 capacity, sdk::i32 head_dim);

/// A budget in scratch memory; tokens and pairs uninitialised.
sdk::Budget make_budget(Scratch& scratch, const sdk::Rows& rows);

/// A budget that the host can read: the same memory on the CPU, else a copy.
class HostBudget {
 public:
  HostBudget(Scratch& scratch, const sdk::Budget& budget);
  HostBudget(const HostBudget&) = delete;
  const sdk::Budget& view() const { return view_; }

 private:
  sdk::Budget view_;
  std::vector<sdk::i64> copy_;
};

/// A selection of make_selection that the host can read: the same memory on the CPU, else a copy; of long lists only
/// what they hold, so that capacities may be smaller.
class HostSelection {
 public:
  HostSelection(Scratch& scratch, const sdk::Selection& selection);
  HostSelection(const HostSelection&) = delete;
  const sdk::Selection& view() const { return view_; }
  /// Throws Error where a strategy wrote beyond its room.
  void check_guards(const Culprit& who) const;

 private:
  sdk::Selection view_;
  sdk::i32 piece_room_, token_room_;  // as planned
  std::unique_ptr<sdk::i32[]> ints_;
  std::unique_ptr<float[]> weights_;
};

/// Asks the strategy for the scores of rows.rows (`value` is taken from the scratch memory, -inf before), checks them
/// if `check` (a row sums to `row_mass` at most), and reduces them over each group where `ranked` are KV heads.
sdk::Scores ask_scores(StrategyRuntime& strategy, KvCache& cache, const CallSpan& span, Scratch& scratch,
                       sdk::Scores scores, const sdk::Rows& ranked, bool check, double row_mass);

/// KV-head rows that read whatever any head of their group chose, each slot listed once, ascending; without log
/// weights.
sdk::Selection unite_groups(Scratch& scratch, CoreOps& ops, const sdk::Paged& kv, const sdk::Selection& of_heads,
                            sdk::i32 num_kv_heads);

/// Everything that `base` reads, exact parts included, as token lists of query-head rows.
void list_cells(Scratch& scratch, const Attention& a, const sdk::Selection& base, const sdk::Selection& to);

}  // namespace lacuna
