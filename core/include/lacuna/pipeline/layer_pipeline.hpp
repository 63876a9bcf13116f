// A cell's strategies on one layer of one sequence, step by step. Replay and the model runner drive the same object;
// they differ only in where Q, K and V come from.
#pragma once

#include <memory>
#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/pipeline/evict.hpp"
#include "lacuna/pipeline/select.hpp"

namespace lacuna {

/// The strategies of a cell; any may be null. No select: everything cached is read.
struct Roles {
  const Resolved *select = nullptr, *evict = nullptr, *allocate = nullptr;
};

struct Step {
  std::vector<float> out;             // [num_qo_heads, queries, head_dim]
  std::vector<float> lse;             // [num_qo_heads, queries]
  std::vector<float> unweighted_out;  // the same set read without its log weights; empty where it has none
  std::vector<float> unweighted_lse;  // likewise
  Choice choice;
  /// choice.sets in original positions: what a cache that never evicted would call them.
  std::vector<RowSet> position_sets;
  AttentionWork work;
};

/// As Attention's.
struct AttendOptions {
  bool ignore_weights = false, precise = false;
};

class LayerPipeline {
 public:
  /// `cache` holds the tokens so far (a fork of the dense parent); `setup` must outlive the pipeline.
  LayerPipeline(const Roles& roles, const LayerSetup& setup, KvCache cache, const ChooseOptions& options);

  /// Select and attend for the prompt, which is all that is cached.
  Step prefill();
  /// Tells the evict strategy of the dense prefill pass over what is cached: out, lse [num_qo_heads, queries(,
  /// head_dim)], host memory.
  void observe_prefill(const std::vector<float>& out, const std::vector<float>& lse);
  /// Evicts once, after the prompt up to here; later calls of step() evict again when the strategy asks for it.
  Eviction evict_at_cut();
  /// Appends the tokens [begin, begin + n) of the source to the cache.
  void append(sdk::i64 begin, sdk::i64 n);
  /// Queries [begin, end), already appended: dense over what is cached (no selection, no eviction): later queries in
  /// bulk.
  Step read_cached(sdk::i64 begin, sdk::i64 end);
  /// Appends token `position` and reads what is cached, with eviction if it is due: tokens between a cut and the first
  /// decode step.
  void follow(sdk::i64 position);
  /// Appends token `position` and runs one decode step: select, attend, attended, and eviction if it is due.
  Step step(sdk::i64 position, sdk::i64 step);

  /// The choice alone that prefill() or step() makes for `span`, whose tokens are cached already. Without account and
  /// check in `options` nothing is read back; once a call of the shape has been made, nothing is allocated either.
  Choice choose_for(const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit);
  /// Attention over a selection (null: everything): out, lse as Step's, memory of the cache's device. Enqueues only.
  AttentionWork attend_to(const CallSpan& span, const sdk::Selection* read, AttendOptions how, float* out, float* lse);
  /// Plans (the select strategy for `select_phase`) and brings side data up to date, as prefill() and step() do first.
  void index(const CallSpan& span, sdk::Phase select_phase) {
    prepare(span, select_phase);
    refresh_sides(span);
  }
  /// Indexes these units anew, dirty or not, after index(): what a token that is appended to them costs. Enqueues only.
  void index_units(const CallSpan& span, const sdk::Dirty& units);
  /// Tells the strategies that ask for it what was read (null: everything) and what came of it; memory of the device.
  void attended(const CallSpan& span, const sdk::Selection* read, const float* out, const float* lse);

  bool evicts_while_decoding() const { return evict_ && evict_->plan().evict_every > 0; }
  const KvCache& cache() const { return cache_; }
  const StrategyRuntime* select() const { return select_.get(); }
  const StrategyRuntime* evict() const { return evict_.get(); }
  /// Selection work so far, all roles.
  Cost selection_cost() const;

 private:
  /// `select_phase`: what the select strategy plans for; at the cut that is the decoding to come.
  void evict_if_due(const CallSpan& span);
  /// Leaves in the cache what the eviction keeps, rewritten where the strategy does that.
  void carry_out(const CallSpan& span, Eviction& e);
  void rewrite_kept(const CallSpan& span, Eviction& e);
  void prepare(const CallSpan& span, sdk::Phase select_phase);
  void refresh_sides(const CallSpan& span);
  void follow_slots();
  Choice everything_for(const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit);
  Step choose_and_attend(const CallSpan& span, bool everything);
  bool dense_layer(const StrategyRuntime& runtime) const;

  LayerSetup setup_;
  QuerySource original_queries_;  // before positions = compacted turned them
  ChooseOptions options_;
  std::unique_ptr<StrategyRuntime> select_, evict_, allocate_;
  KvCache cache_;
  sdk::i64 since_cut_ = 0;  // tokens appended one by one since the cut
  sdk::i64 capacity_ = -1;  // target fixed at the cut
  bool compacted_ = false;
  std::vector<std::byte> host_queries_;  // those, on the host, once they are turned
  Buffer<float> turned_queries_;
};

}  // namespace lacuna
