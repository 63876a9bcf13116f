// One layer of one trace, ready to be replayed: its tensors in a paged cache, and dense attention over them.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "lacuna/pipeline/layer_pipeline.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

class LayerReplay {
 public:
  /// Throws Error for a bad layer. `poison`: freed and unwritten cache slots hold NaN.
  LayerReplay(const Trace& trace, int layer, sdk::i32 page_size, bool poison);
  LayerReplay(const LayerReplay&) = delete;

  /// What pipelines on this layer are set up with.
  LayerSetup setup(std::uint64_t seed, bool check) const;
  /// A fork of a cache that holds the first `tokens` tokens.
  KvCache fork(sdk::i64 tokens);
  /// Drops the dense parents that fork() keeps.
  void release_parents() { parents_.clear(); }
  const PagePool& pool() const { return *pool_; }

  /// Dense attention, all queries: [num_qo_heads, T, head_dim], [num_qo_heads, T].
  const std::vector<float>& dense_out() const { return dense_out_; }
  const std::vector<float>& dense_lse() const { return dense_lse_; }
  /// Copies of the queries [begin, end): [num_qo_heads, n(, head_dim)].
  std::vector<float> dense_out(sdk::i64 begin, sdk::i64 end) const;
  std::vector<float> dense_lse(sdk::i64 begin, sdk::i64 end) const;

  /// Queries [begin, end) over the dense cache of `end` tokens; good until the next call here or of fork().
  Attention dense_attention(sdk::i64 begin, sdk::i64 end);

  const sdk::Layer& layer() const { return layer_; }
  const LayerTensors& tensors() const { return tensors_; }
  sdk::i64 tokens() const { return tokens_; }

 private:
  static constexpr std::size_t kMostParents = 3;
  KvCache& parent(sdk::i64 tokens);

  sdk::Layer layer_{};
  LayerTensors tensors_;
  sdk::i64 tokens_ = 0;
  Rope rope_;
  std::shared_ptr<PagePool> pool_;
  std::map<sdk::i64, KvCache> parents_;
  std::vector<float> dense_out_, dense_lse_;
};

}  // namespace lacuna
