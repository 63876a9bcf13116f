// One layer of one trace, ready to be replayed: its tensors in a paged cache, and dense attention over them.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "lacuna/device/budget.hpp"
#include "lacuna/pipeline/layer_pipeline.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

class LayerReplay {
 public:
  /// Throws Error for a bad layer or too little memory. `poison`: freed and unwritten cache slots hold NaN. The layer's
  /// tensors are copied to `device`, if that is not the CPU, and pipelines work there.
  LayerReplay(const Trace& trace, int layer, sdk::i32 page_size, bool poison,
              std::shared_ptr<Device> device = cpu_device());
  LayerReplay(const LayerReplay&) = delete;

  /// What replaying a layer takes of a device's memory, whatever the cells: tensors, caches, dense results, the
  /// operations' workspace, and the least room for scores and lists (more is used where it is free).
  static MemoryPlan memory(const Trace& trace, int layer, sdk::i32 page_size);

  /// What pipelines on this layer are set up with.
  LayerSetup setup(std::uint64_t seed, bool check) const;
  /// A fork of a cache that holds the first `tokens` tokens.
  KvCache fork(sdk::i64 tokens);
  /// Drops the dense parents that fork() keeps.
  void release_parents() {
    parents_.clear();
    host_parents_.clear();
  }
  const PagePool& pool() const { return *pool_; }

  /// Dense attention, all queries: [num_qo_heads, T, head_dim], [num_qo_heads, T].
  const std::vector<float>& dense_out() const { return dense_out_; }
  const std::vector<float>& dense_lse() const { return dense_lse_; }
  /// Copies of the queries [begin, end): [num_qo_heads, n(, head_dim)].
  std::vector<float> dense_out(sdk::i64 begin, sdk::i64 end) const;
  std::vector<float> dense_lse(sdk::i64 begin, sdk::i64 end) const;

  /// Queries [begin, end) over the dense cache of `end` tokens, in memory of the device; good until the next call here
  /// or of fork().
  Attention dense_attention(sdk::i64 begin, sdk::i64 end);
  /// The same in host memory, for what has no kernels on the device.
  Attention host_attention(sdk::i64 begin, sdk::i64 end);
  /// Dense lse [num_qo_heads, T] in memory of the device.
  const float* device_lse() const { return setup_lse_; }

  /// How pipelines on this layer are to choose: contracts checked, and ranges as large as the device has room for.
  ChooseOptions choose_options(bool keep_lists, bool keep_scores) const;

  bool on_device() const { return scratch_->on_device(); }
  Scratch& scratch() const { return *scratch_; }

  const sdk::Layer& layer() const { return layer_; }
  const LayerTensors& tensors() const { return tensors_; }
  sdk::i64 tokens() const { return tokens_; }

 private:
  static constexpr std::size_t kMostParents = 3;
  using Parents = std::map<sdk::i64, KvCache>;
  KvCache& parent(sdk::i64 tokens);
  KvCache& find_or_make(Parents& parents, const std::shared_ptr<PagePool>& pool, const KvSource& source,
                        sdk::i64 tokens);
  std::shared_ptr<PagePool> make_pool(const std::shared_ptr<Device>& device, sdk::i64 caches) const;

  sdk::Layer layer_{};
  LayerTensors tensors_;
  sdk::i64 tokens_ = 0, prompt_tokens_ = 0;
  std::optional<Segment> question_;
  sdk::i32 page_size_;
  sdk::i64 range_elements_;  // of choose_options
  bool poison_;
  Rope rope_;
  std::shared_ptr<Scratch> scratch_;
  Buffer<std::byte> device_q_, device_k_, device_v_;  // where the device is not the CPU
  Buffer<float> device_lse_;
  const float* setup_lse_ = nullptr;
  QuerySource queries_;  // where the pipelines read them
  KvSource kv_;
  std::shared_ptr<PagePool> pool_, host_pool_;
  Parents parents_, host_parents_;
  std::vector<float> dense_out_, dense_lse_;
};

}  // namespace lacuna
