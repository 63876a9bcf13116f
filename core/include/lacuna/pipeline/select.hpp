// One selection: score -> reduce -> target -> allocate -> force -> rank | mark -> refine, for every row of a call.
#pragma once

#include <vector>

#include "lacuna/ops/row_set.hpp"
#include "lacuna/pipeline/runtime.hpp"

namespace lacuna {

/// A selection that owns its arrays.
class OwnedSelection {
 public:
  OwnedSelection() = default;
  /// All rows empty, room as given.
  OwnedSelection(const sdk::Rows& rows, sdk::i32 kv_block, sdk::i64 piece_capacity, sdk::i64 token_capacity,
                 bool weighted);
  OwnedSelection(OwnedSelection&&) = default;
  OwnedSelection& operator=(OwnedSelection&&) = default;
  sdk::Selection& view() { return view_; }
  const sdk::Selection& view() const { return view_; }

 private:
  sdk::Selection view_{};
  std::vector<sdk::i32> ints_;
  std::vector<float> weights_;
};

/// How well a row's realised set keeps to its target; pairs summed over the rows of one layer.
struct BudgetAccount {
  double target_pairs = 0;    // 0 where no budget was given
  double realised_pairs = 0;  // per query head, mean over heads is the same ratio
  double union_pairs = 0;     // union over each GQA group, per KV head
  double visible_pairs = 0;   // of all query heads
  double union_visible = 0;   // of all KV heads
  double slack_pairs = 0;     // one unit a row: how far an exact ranking may miss its target
  double causal_loss = 0;     // what causality cuts off listed units: excuses a shortfall
  bool floor = false;         // the forced units exceed the target

  void add(const BudgetAccount& other);
};

struct Choice {
  OwnedSelection selection;
  std::vector<RowSet> sets;  // [num_qo_heads * tiles], slots of the cache
  sdk::i32 q_tile = 1, tiles = 1;
  bool rank_normalised = false;  // an allocator compared heads whose scores are not comparable
  BudgetAccount budget;
  double touched_tokens = 0;  // distinct (KV head, slot) fetched, summed over tiles: union over the group
  std::vector<float> scores;  // with `keep_scores`: [rows, stride] as ranked (after reduction)
  sdk::i64 scores_stride = 0;
};

struct ChooseOptions {
  bool check = false;
  bool keep_scores = false;
  sdk::i64 score_floats = sdk::i64{16} << 20;  // scores held at once; more tiles go in ranges
};

/// Chooses for the current queries of `span`, whose keys are the newest of the cache. `allocator` may be null. Sides
/// must be up to date. Throws lacuna::Error for a breach of contract or a strategy's own failure.
Choice choose(StrategyRuntime& strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
              const CallSpan& span, const ChooseOptions& options);

/// The same result as a strategy that reads everything (layers that a scenario keeps dense).
Choice choose_everything(const KvCache& cache, const LayerSetup& setup, const CallSpan& span, sdk::i32 q_tile);

}  // namespace lacuna
