// One selection: score -> reduce -> target -> allocate -> force -> rank | mark -> refine, for every row of a call. The
// path from scores to lists runs where the cache is and reads nothing back; what is reported about it (sets, budgets)
// is worked out on the host, and only when asked for.
#pragma once

#include <functional>
#include <vector>

#include "lacuna/ops/row_set.hpp"
#include "lacuna/pipeline/runtime.hpp"

namespace lacuna {

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

/// The lists of one row as they were chosen.
struct RowLists {
  std::vector<sdk::i32> pieces, tokens;  // pieces: first slots
  sdk::i32 sinks = 0, window = 0, full = 0;
};

/// What is known of a choice on the host.
struct Choice {
  sdk::Rows rows{};  // that were chosen for: query heads, or KV heads whose group reads the same
  sdk::i32 kv_block = 0;
  bool weighted = false;         // the selection has log weights
  bool rank_normalised = false;  // an allocator compared heads whose scores are not comparable
  // With ChooseOptions::account:
  std::vector<RowSet> sets;  // [num_qo_heads * tiles], slots of the cache
  BudgetAccount budget;
  double touched_tokens = 0;  // distinct (KV head, slot) fetched, summed over tiles: union over the group
  // With keep_lists, keep_scores:
  std::vector<RowLists> lists;  // [rows]
  std::vector<float> scores;    // [rows, stride] as ranked (after reduction)
  sdk::i64 scores_stride = 0;

  sdk::i32 q_tile() const { return rows.q_tile; }
  sdk::i32 tiles() const { return rows.tiles; }
};

struct ChooseOptions {
  bool check = false;   // the strategy's results against its contract
  bool account = true;  // sets, budget and touched tokens of the choice
  bool keep_lists = false, keep_scores = false;
  sdk::i64 range_elements = sdk::i64{32} << 20;  // scores, or entries of lists, that exist at once; more tiles: ranges
};

/// Memory of an element of a range: its score and its group's, list entries, members of unions.
inline constexpr sdk::i64 kRangeElementBytes = 20;

/// Called with the selection of each range of tiles, in order; it is memory of the cache's device and gone after the
/// call.
using RangeVisitor = std::function<void(const sdk::Selection&)>;

/// Chooses for the current queries of `span`, whose keys are the newest of the cache. `allocator` may be null. Sides
/// must be up to date. Throws lacuna::Error for a breach of contract or a strategy's own failure.
Choice choose(StrategyRuntime& strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
              const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit);

/// The same result as a strategy that reads everything (layers that a scenario keeps dense).
Choice choose_everything(const KvCache& cache, const LayerSetup& setup, const CallSpan& span, sdk::i32 q_tile,
                         const ChooseOptions& options, const RangeVisitor& visit);

}  // namespace lacuna
