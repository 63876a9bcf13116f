// The layer that is timed: a trace's layer blown up to the wanted shape, and its place on the device.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/device/budget.hpp"
#include "lacuna/pipeline/layer_pipeline.hpp"
#include "lacuna/replay/timing.hpp"

namespace lacuna {

/// Host memory, in CostOptions::dtype.
struct TiledLayer {
  sdk::Layer layer{};
  RopeConfig rope;
  std::vector<sdk::u16> q, k, v;  // [num_qo_heads | num_kv_heads, tokens, head_dim]
  std::string source;
};

/// Token t is the trace's token t mod T; KV head h its head h mod H, and query heads follow within their group. Where
/// the trace's head size divides the wanted one r times, channels are repeated r times and softmax_scale becomes
/// scale / r, so that logits are the trace's own: those of q / sqrt(r) at scale / sqrt(r), without rounding q again.
/// Else a seeded synthetic layer of the wanted heads is tiled along positions. Throws Error for a bad shape.
TiledLayer tile_layer(const Trace& trace, int layer, const CostShape& shape, sdk::i64 tokens, sdk::Dtype dtype);

/// The captured layer to time: the middle one of those without a sliding window that no cell keeps dense; failing
/// that, of all.
int layer_to_time(const TraceInfo& info, const std::vector<Cell>& cells);

/// Caches that `bytes` of K and V are copied into so that all of them exceed twice the L2 cache; 2 to 16.
int copies_needed(std::size_t bytes, std::size_t l2_bytes);

/// (query, key) scores or list entries that a choice may hold at once.
inline constexpr sdk::i64 kRangeElements = sdk::i64{128} << 20;

/// What timing at this shape takes, but for the strategies' side data, whose size only they know.
MemoryPlan timing_memory(const CostOptions& options, sdk::i64 tokens, sdk::i32 page_size, std::size_t l2_bytes,
                         bool on_device);

/// The tiled layer on a device, and dense attention over it.
class TimedLayer {
 public:
  TimedLayer(const TiledLayer& tiled, sdk::i64 tokens, sdk::i32 page_size, sdk::Dtype dtype,
             std::shared_ptr<Device> device);
  TimedLayer(const TimedLayer&) = delete;

  /// A cache of its own pool that holds the first `tokens` tokens.
  KvCache cache(sdk::i64 tokens) const;
  /// Scratch of its own: what a cell took goes back with it.
  LayerSetup setup(std::uint64_t seed) const;

  const sdk::Layer& layer() const { return layer_; }
  sdk::i64 tokens() const { return tokens_; }
  /// K + V bytes of a token of one KV head, and of everything.
  double token_bytes() const { return 2.0 * layer_.head_dim * static_cast<double>(sdk::size_of(dtype_)); }
  std::size_t kv_bytes() const;
  /// Where attention that is timed writes: [num_qo_heads, tokens(, head_dim)].
  float* out() const { return out_.data(); }
  float* lse() const { return lse_.data(); }
  const std::shared_ptr<Device>& device() const { return device_; }

 private:
  sdk::Layer layer_{};
  sdk::i64 tokens_;
  sdk::i32 page_size_;
  sdk::Dtype dtype_;
  std::shared_ptr<Device> device_;
  Rope rope_;
  Buffer<std::byte> q_, k_, v_;
  Buffer<float> out_, lse_, dense_lse_;
};

}  // namespace lacuna
