#include "replay/timing_layer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/base/error.hpp"

namespace lacuna {
using namespace sdk;

namespace {

constexpr i64 kSyntheticTokens = 4096;  // longer layers repeat them
constexpr int kMostCopies = 16;

u16 to_half(float x, Dtype dtype) { return dtype == Dtype::bf16 ? to_bf16(x) : to_f16(x); }

/// One head of `from` [heads, count, d] at `to` [tokens, d * repeat]. A tensor of the wanted type keeps its bits.
void tile_head(const Tensor& from, i64 head, i64 repeat, u16* to, i64 tokens, Dtype dtype) {
  const i64 count = from.shape[1], d = from.shape[2], width = d * repeat;
#pragma omp parallel for
  for (i64 t = 0; t < std::min(tokens, count); ++t)
    for (i64 c = 0; c < d; ++c) {
      const i64 at = (head * count + t) * d + c;
      const u16 x = from.dtype == dtype ? static_cast<const u16*>(from.data)[at]
                                        : to_half(load(from.data, from.dtype, at), dtype);
      for (i64 r = 0; r < repeat; ++r) to[t * width + r * d + c] = x;
    }
  for (i64 t = count; t < tokens; t += count) std::copy_n(to, std::min(count, tokens - t) * width, to + t * width);
}

void check_shape(const CostShape& s) {
  if (s.num_kv_heads > 0 && s.head_dim > 0 && s.num_qo_heads > 0 && s.num_qo_heads % s.num_kv_heads == 0) return;
  throw lacuna::Error({"bad shape of the layer to time", "query heads that are a multiple of the KV heads",
                       fmt::format("{} and {}, head_dim {}", s.num_qo_heads, s.num_kv_heads, s.head_dim),
                       "[cost] shape", ""});
}

/// Pages that hold `tokens` tokens of every head.
i64 pages_for(i64 tokens, i32 page_size, i32 heads) { return heads * ((tokens + page_size - 1) / page_size); }

}  // namespace

TiledLayer tile_layer(const Trace& trace, int layer, const CostShape& shape, i64 tokens, Dtype dtype) {
  check_shape(shape);
  const TraceInfo& info = trace.info();
  if (shape.head_dim % info.head_dim != 0) {
    SyntheticSpec spec;
    spec.num_qo_heads = shape.num_qo_heads;
    spec.num_kv_heads = shape.num_kv_heads;
    spec.head_dim = shape.head_dim;
    spec.prefill_tokens = std::min(tokens, kSyntheticTokens);
    spec.decode_tokens = 0;
    spec.num_layers = info.num_layers;
    spec.captured_layers = {layer};
    TiledLayer out = tile_layer(synthetic_trace(spec), layer, shape, tokens, dtype);
    out.source = fmt::format(
        "synthetic layer of {} tokens with sinks and heavy keys (seed {}), repeated: head_dim {} of "
        "the trace does not divide {}",
        spec.prefill_tokens, spec.seed, info.head_dim, shape.head_dim);
    return out;
  }
  const i64 repeat = shape.head_dim / info.head_dim;
  const LayerTensors from = trace.layer(layer);
  TiledLayer out;
  out.layer = info.layer(layer);
  const i32 group = shape.num_qo_heads / shape.num_kv_heads, from_group = out.layer.group(),
            from_kv = out.layer.num_kv_heads;
  out.layer.num_qo_heads = shape.num_qo_heads;
  out.layer.num_kv_heads = shape.num_kv_heads;
  out.layer.head_dim = shape.head_dim;
  out.layer.softmax_scale /= static_cast<float>(repeat);
  out.layer.sliding_window = 0;
  if (const auto rope = info.rope.find(layer); rope != info.rope.end()) out.rope = rope->second;
  out.source = fmt::format("{} layer {}: {} tokens repeated, {} query and {} KV heads repeated",
                           std::filesystem::path(info.path).filename().string(), layer, info.tokens(),
                           info.num_qo_heads, info.num_kv_heads);
  if (repeat > 1)
    out.source += fmt::format(", {} channels repeated {} times (logits unchanged)", info.head_dim, repeat);
  if (from.k.dtype != dtype || from.q.dtype != dtype) out.source += ", rounded";

  const i64 head_elements = tokens * shape.head_dim;
  out.q.resize(static_cast<std::size_t>(shape.num_qo_heads * head_elements));
  out.k.resize(static_cast<std::size_t>(shape.num_kv_heads * head_elements));
  out.v.resize(out.k.size());
  for (i64 h = 0; h < shape.num_kv_heads; ++h) {
    tile_head(from.k, h % from_kv, repeat, out.k.data() + h * head_elements, tokens, dtype);
    tile_head(from.v, h % from_kv, repeat, out.v.data() + h * head_elements, tokens, dtype);
    for (i64 g = 0; g < group; ++g)
      tile_head(from.q, h % from_kv * from_group + g % from_group, repeat,
                out.q.data() + (h * group + g) * head_elements, tokens, dtype);
  }
  return out;
}

int layer_to_time(const TraceInfo& info, const std::vector<Cell>& cells) {
  std::vector<int> fit;
  for (const int layer : info.captured_layers) {
    const bool dense = std::any_of(cells.begin(), cells.end(), [&](const Cell& c) {
      return (c.select && c.select->keeps_dense(layer)) || (c.evict && c.evict->keeps_dense(layer));
    });
    if (!dense && info.layer(layer).sliding_window == 0) fit.push_back(layer);
  }
  if (fit.empty()) fit = info.captured_layers;
  return fit[fit.size() / 2];
}

int copies_needed(std::size_t bytes, std::size_t l2_bytes) {
  const std::size_t least = bytes > 0 ? 2 * l2_bytes / bytes + 1 : kMostCopies;
  return static_cast<int>(std::clamp<std::size_t>(least, 2, kMostCopies));
}

MemoryPlan timing_memory(const CostOptions& options, i64 tokens, i32 page_size, std::size_t l2_bytes, bool on_device) {
  const CostShape& s = options.shape;
  check_shape(s);
  const auto size = [](double bytes) { return static_cast<std::size_t>(bytes); };
  const double element = static_cast<double>(size_of(options.dtype));
  const double head = static_cast<double>(tokens) * s.head_dim;
  const std::size_t kv = size(2 * s.num_kv_heads * head * element);
  const bool decodes = options.phases.count(ReplayPhase::decode) > 0;
  const i64 pages = pages_for(tokens, page_size, s.num_kv_heads) + 1;
  const double page_bytes = page_size * (2.0 * s.head_dim * element + sizeof(i32));
  MemoryPlan plan;
  plan.add("queries", size(s.num_qo_heads * head * element));
  plan.add("keys and values", kv);
  plan.add("dense results", size(s.num_qo_heads * (head + 2.0 * static_cast<double>(tokens)) * sizeof(float)));
  plan.add("KV caches", size((decodes ? copies_needed(kv, l2_bytes) : 1) * static_cast<double>(pages) * page_bytes));
  // Scores, grouped scores, lists and what makes one of another, of a range; never more than all of them.
  const double all =
      static_cast<double>(s.num_qo_heads) * static_cast<double>(tokens) * static_cast<double>(tokens) / 64;
  plan.add("scores and lists", size(kRangeElementBytes * std::min(static_cast<double>(kRangeElements), all)));
  if (!on_device) return plan;
  Layer layer{0, 1, s.num_qo_heads, s.num_kv_heads, s.head_dim, 1, 0};
  plan.add("operations' workspace", ops_workspace_bytes(true, layer, 1, tokens, tokens));
  // Key lists of a selection that attention makes for itself: at most 512 MiB, or one row (attend_cuda).
  plan.add("attention's workspace", std::size_t{512} << 20);
  return plan;
}

TimedLayer::TimedLayer(const TiledLayer& tiled, i64 tokens, i32 page_size, Dtype dtype, std::shared_ptr<Device> device)
    : layer_(tiled.layer),
      tokens_(tokens),
      page_size_(page_size),
      dtype_(dtype),
      device_(std::move(device)),
      rope_(tiled.rope, layer_.head_dim) {
  const auto upload = [&](Buffer<std::byte>& to, const std::vector<u16>& from) {
    to = Buffer<std::byte>(device_, static_cast<i64>(from.size() * sizeof(u16)));
    device_->copy_in(to.data(), from.data(), from.size() * sizeof(u16));
  };
  upload(q_, tiled.q);
  upload(k_, tiled.k);
  upload(v_, tiled.v);
  const i64 rows = layer_.num_qo_heads * tokens_;
  out_ = Buffer<float>(device_, rows * layer_.head_dim);
  lse_ = Buffer<float>(device_, rows);
  dense_lse_ = Buffer<float>(device_, rows);  // for the clairvoyant, who may know it
  LayerPipeline dense({}, setup(0), cache(tokens_), {});
  dense.attend_to({Phase::prefill, -1, 0, tokens_}, nullptr, {}, out_.data(), dense_lse_.data());
  device_->synchronize();
}

KvCache TimedLayer::cache(i64 tokens) const {
  auto pool = std::make_shared<PagePool>(device_, page_size_, layer_.head_dim, dtype_,
                                         pages_for(tokens_, page_size_, layer_.num_kv_heads), false);
  KvCache out(std::move(pool), layer_.num_kv_heads, tokens_);
  out.append(k_.data(), v_.data(), dtype_, tokens_ * layer_.head_dim, tokens, 0);
  return out;
}

LayerSetup TimedLayer::setup(std::uint64_t seed) const {
  LayerSetup s;
  s.layer = layer_;
  s.queries = {q_.data(), dtype_, tokens_, dense_lse_.data()};
  s.kv = {k_.data(), v_.data(), dtype_, tokens_};
  s.rope = &rope_;
  s.seed = seed;
  s.max_tokens = s.prompt_tokens = tokens_;
  s.scratch = std::make_shared<Scratch>(device_);
  return s;
}

std::size_t TimedLayer::kv_bytes() const {
  return static_cast<std::size_t>(token_bytes()) * static_cast<std::size_t>(tokens_ * layer_.num_kv_heads);
}

}  // namespace lacuna
