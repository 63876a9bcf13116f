// One eviction: score(evict) -> reduce -> allocate -> retain | top-k -> compaction of the cache.
#pragma once

#include <vector>

#include "lacuna/pipeline/select.hpp"

namespace lacuna {

struct Eviction {
  std::vector<std::vector<sdk::i32>> kept;  // slots before compaction, per KV head, ascending
  sdk::i64 target_tokens = 0;  // of a KV head in this layer before allocate_rows; the cached tokens when unlimited
  sdk::i64 mean_tokens = 0;    // uniform target over the model's layers
  double allocated_mean = 0;   // mean over the model's layers that allocate_layers gave
  double kept_tokens = 0, cached_tokens = 0;  // summed over KV heads
  double dropped_tokens = 0;  // that key channels dropped from kept tokens are worth, summed over KV heads
  sdk::i64 unit_tokens = 1;   // that an explicit choice keeps or drops together
  bool limited = false, floor = false, rank_normalised = false;
  std::vector<float> scores;  // with keep_scores: [rows, cached] after reduction
  sdk::i64 scores_rows = 0;
};

/// Decides what each KV head keeps (the cache is not touched yet; apply with cache.retain(kept)). `strategy` may be
/// null when the allocator alone decides by rules. `capacity` >= 0: the target fixed at an earlier cut (eviction while
/// decoding), else the budget applies to what is cached. Throws lacuna::Error.
Eviction decide_eviction(StrategyRuntime* strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
                         const CallSpan& span, sdk::i64 capacity, const ChooseOptions& options);

/// The scores by which an eviction by `strategy` would rank the tokens of `cache`, into `out` (value as out.rows and
/// out.stride say): reduced over the group, with the tokens that it forces at +inf. A strategy that chooses explicitly
/// gives 0 to what it would keep of out.budget_tokens and -inf to the rest. Sides must be up to date. Throws Error.
void rank_scores(StrategyRuntime& strategy, KvCache& cache, const LayerSetup& setup, const CallSpan& span,
                 sdk::Scores& out);

/// rank_scores of the tokens of `subset` when nothing else is cached, at their slots in `cache`; -inf elsewhere. Reads
/// the subset back.
void rank_subset(StrategyRuntime& strategy, const KvCache& cache, const LayerSetup& setup, const CallSpan& span,
                 const sdk::Subset& subset, sdk::Scores& out);

}  // namespace lacuna
