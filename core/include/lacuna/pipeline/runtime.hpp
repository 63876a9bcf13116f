// One strategy at work on one layer of one sequence: its instance, plan, states and sides, and the services that its
// roles are called with.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/kv/kv_cache.hpp"
#include "lacuna/ops/core_ops.hpp"
#include "lacuna/pipeline/scratch.hpp"
#include "lacuna/strategy/contract.hpp"
#include "lacuna/strategy/instance.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// The layer's queries [num_qo_heads, tokens, head_dim] after RoPE, and what the clairvoyant may know; memory of the
/// cache's device.
struct QuerySource {
  const void* data = nullptr;
  sdk::Dtype dtype = sdk::Dtype::f32;
  sdk::i64 tokens = 0;
  const float* dense_lse = nullptr;  // [num_qo_heads, tokens] of dense attention, for oracles

  /// Queries at positions [begin, end).
  sdk::Queries span(const sdk::Layer& layer, sdk::i64 begin, sdk::i64 end) const;
};

/// The layer's keys and values [num_kv_heads, tokens, head_dim], keys after RoPE; memory of the cache's device.
struct KvSource {
  const void *k = nullptr, *v = nullptr;
  sdk::Dtype dtype = sdk::Dtype::f32;
  sdk::i64 tokens = 0;
};

/// What strategies carry from layer to layer: arrays by name, phase and step, in a device's memory.
class CarriedArrays {
 public:
  /// The array of that key, zero-filled the first time. Throws Error if it had another size.
  void* array(const std::string& key, sdk::i64 bytes, const std::shared_ptr<Device>& device);

 private:
  std::map<std::string, Buffer<std::byte>> arrays_;
};

/// What is the same for every call of a run on this layer.
struct LayerSetup {
  sdk::Layer layer{};
  QuerySource queries;
  KvSource kv;
  const Rope* rope = nullptr;  // for positions = compacted
  std::uint64_t seed = 0;
  bool check = false;                // poison: queries after a call's own are NaN
  sdk::i64 max_tokens = 0;           // longest the sequence gets
  std::shared_ptr<Scratch> scratch;  // of the cache's device
  sdk::i64 prompt_tokens = 0, question_begin = 0, question_tokens = 0;
  const Tensor* wo = nullptr;        // W_O in host memory; absent: the trace has none
  const Tensor* k_pre = nullptr;     // keys before RoPE where the trace has them, in host memory
  const double* entropy = nullptr;   // [num_layers], see sdk::LayerBudget
  CarriedArrays* carried = nullptr;  // of this cell and phase; none: layers stand alone
};

/// The queries of one call.
struct CallSpan {
  sdk::Phase phase;
  sdk::i64 step;        // -1 in prefill
  sdk::i64 begin, end;  // positions of the current queries
};

class StrategyRuntime {
 public:
  /// `role` is "select", "evict", "allocate" or "base": names the strategy's sides and errors.
  StrategyRuntime(const Resolved& resolved, sdk::Purpose purpose, const LayerSetup& setup, std::string role);
  ~StrategyRuntime();
  StrategyRuntime(StrategyRuntime&&) noexcept;

  const Resolved& resolved() const { return instance_.resolved(); }
  const sdk::Entry& entry() const { return instance_.entry(); }
  const sdk::Plan& plan() const { return plan_; }
  const Instance& instance() const { return instance_; }
  StrategyRuntime* base() { return base_.get(); }
  sdk::Gqa gqa() const { return common_.gqa; }
  Culprit culprit(const char* role) const;
  /// Work of this strategy and its base so far.
  Cost cost() const;

  /// Calls plan() and declares its sides on the cache, the first time; a runtime works on one cache.
  void prepare(KvCache& cache, const CallSpan& span, sdk::i64 budget_tokens);
  /// Side granularities in tokens that index() must be told about (own and base's).
  std::vector<sdk::i32> granularities() const;
  /// Calls index() with the dirty units; the first time of a granularity with every unit.
  void index(KvCache& cache, const CallSpan& span, const sdk::Dirty& dirty);

  /// The core's own work beside the strategy's, on the call's backend and at the strategy's cost. What it takes of the
  /// scratch memory is the caller's.
  void with_ops(KvCache& cache, const CallSpan& span, const std::function<void(CoreOps&)>& f);

  void score(KvCache& cache, const CallSpan& span, sdk::Scores& scores);
  void mark(KvCache& cache, const CallSpan& span, const sdk::Budget& budget, sdk::Selection& selection);
  void refine(KvCache& cache, const CallSpan& span, const sdk::Budget& budget, sdk::Selection& selection);
  void allocate_layers(KvCache& cache, const CallSpan& span, sdk::LayerBudget& budget);
  void allocate_rows(KvCache& cache, const CallSpan& span, const sdk::Scores* scores, sdk::Budget& budget);
  void retain(KvCache& cache, const CallSpan& span, const sdk::Budget& budget, sdk::Kept& kept);
  void attended(KvCache& cache, const CallSpan& span, const sdk::Attended& attended);
  /// Calls calibrate() alone, on what is cached.
  void calibrate(KvCache& cache, const CallSpan& span, sdk::Calibration& calibration);
  void rewrite(KvCache& cache, const CallSpan& span, const sdk::Rewrite& rewrite);

  /// Replaces the queries (positions = compacted turns them with their slots).
  void set_queries(const QuerySource& queries);

  /// Whether its selections have log weights.
  bool weighs() const {
    return instance_.has_refine() ? plan_.weighted || base_->weighs() : instance_.has_mark() && plan_.weighted;
  }

  /// Whether its selections have tokens that are in no cache.
  bool adds_extras() const { return instance_.has_mark() && plan_.max_extras > 0; }

  /// Whether its scores of different heads may be compared: said by itself, or by the base whose scores it passes on.
  bool comparable_across_heads() const {
    return entry().comparable_across_heads || (base_ && instance_.has_score() && base_->comparable_across_heads());
  }

  bool wants_attended() const { return instance_.has_attended() || (base_ && base_->wants_attended()); }
  bool rewrites() const { return instance_.has_rewrite() || (base_ && base_->rewrites()); }

 private:
  class Services;
  template <class F>
  void call(KvCache& cache, const CallSpan& span, F f);
  void check_plan() const;
  sdk::Call facts_of(const KvCache& cache, const CallSpan& span) const;
  std::unique_ptr<CoreOps> ops_for(const sdk::Call& call);

  LayerSetup setup_;
  sdk::Purpose purpose_;
  std::string role_;
  Instance instance_;
  sdk::Common common_;
  std::unique_ptr<StrategyRuntime> base_;
  sdk::Plan plan_{};
  bool planned_ = false, turned_ = false;  // turned: queries and keys sit at slots, not at their positions
  std::map<std::string, Buffer<std::byte>> states_;
  std::map<std::string, Buffer<std::byte>> uploads_;  // what calls were given of host memory, on a device
  std::map<sdk::i32, bool> indexed_;
  Cost cost_;
};

}  // namespace lacuna
