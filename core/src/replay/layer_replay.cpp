#include "lacuna/replay/layer_replay.hpp"

#include <algorithm>

#include "lacuna/base/error.hpp"

namespace lacuna {
using namespace sdk;

namespace {
/// Rows [begin, end) of a [heads, tokens, width] array, contiguous.
std::vector<float> slice(const std::vector<float>& all, i64 heads, i64 tokens, i64 width, i64 begin, i64 end) {
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(heads * (end - begin) * width));
  for (i64 h = 0; h < heads; ++h)
    out.insert(out.end(), all.begin() + (h * tokens + begin) * width, all.begin() + (h * tokens + end) * width);
  return out;
}
}  // namespace

LayerReplay::LayerReplay(const Trace& trace, int layer, i32 page_size, bool poison)
    : layer_(trace.info().layer(layer)),
      tensors_(trace.layer(layer)),
      tokens_(trace.info().tokens()),
      rope_(trace.info().rope.at(layer), layer_.head_dim) {
  if (tensors_.k.dtype != tensors_.v.dtype)
    throw lacuna::Error(Problem{"keys and values of one layer differ in element type", "one dtype for k and v", "two",
                                trace.info().path + ": layers." + std::to_string(layer),
                                "write both in the same dtype"});
  const i64 pages_a_head = (tokens_ + page_size - 1) / page_size;
  // Parents share nothing with each other; beside them there is one working fork, and what it copies of a page it is
  // about to drop.
  constexpr i64 kCaches = kMostParents + 2;
  pool_ = std::make_shared<PagePool>(cpu_device(), page_size, layer_.head_dim, tensors_.k.dtype,
                                     kCaches * layer_.num_kv_heads * (pages_a_head + 1), poison);
  dense_out_.resize(static_cast<std::size_t>(layer_.num_qo_heads * tokens_ * layer_.head_dim));
  dense_lse_.resize(static_cast<std::size_t>(layer_.num_qo_heads * tokens_));
  attend(dense_attention(0, tokens_), dense_out_.data(), dense_lse_.data());
}

LayerSetup LayerReplay::setup(std::uint64_t seed, bool check) const {
  LayerSetup s;
  s.layer = layer_;
  s.queries = {tensors_.q.data, tensors_.q.dtype, tokens_, dense_lse_.data()};
  s.kv = {tensors_.k.data, tensors_.v.data, tensors_.k.dtype, tokens_};
  s.rope = &rope_;
  s.seed = seed;
  s.check = check;
  s.max_tokens = tokens_;
  return s;
}

KvCache& LayerReplay::parent(i64 tokens) {
  const auto found = parents_.find(tokens);
  if (found != parents_.end()) return found->second;
  if (parents_.size() == kMostParents) parents_.clear();
  KvCache cache(pool_, layer_.num_kv_heads, tokens_);
  cache.append(tensors_.k.data, tensors_.v.data, tensors_.k.dtype, tokens_ * layer_.head_dim, tokens, 0);
  return parents_.emplace(tokens, std::move(cache)).first->second;
}

KvCache LayerReplay::fork(i64 tokens) { return parent(tokens).fork(); }

Attention LayerReplay::dense_attention(i64 begin, i64 end) {
  return Attention{layer_, parent(end).view(), setup(0, false).queries.span(layer_, begin, end)};
}

std::vector<float> LayerReplay::dense_out(i64 begin, i64 end) const {
  return slice(dense_out_, layer_.num_qo_heads, tokens_, layer_.head_dim, begin, end);
}
std::vector<float> LayerReplay::dense_lse(i64 begin, i64 end) const {
  return slice(dense_lse_, layer_.num_qo_heads, tokens_, 1, begin, end);
}

}  // namespace lacuna
