#include "lacuna/replay/layer_replay.hpp"

#include <algorithm>

#include "lacuna/attention/cuda_attention.hpp"
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

constexpr i64 kLeastRange = i64{16} << 20, kMostRange = i64{512} << 20;  // scores, or entries of lists, at once
}  // namespace

LayerReplay::LayerReplay(const Trace& trace, int layer, i32 page_size, bool poison, std::shared_ptr<Device> device)
    : layer_(trace.info().layer(layer)),
      tensors_(trace.layer(layer)),
      tokens_(trace.info().tokens()),
      prompt_tokens_(trace.info().prefill_tokens),
      question_(trace.info().segment("question")),
      page_size_(page_size),
      poison_(poison),
      rope_(trace.info().rope.at(layer), layer_.head_dim),
      scratch_(std::make_shared<Scratch>(std::move(device))) {
  if (tensors_.k.dtype != tensors_.v.dtype)
    throw lacuna::Error(Problem{"keys and values of one layer differ in element type", "one dtype for k and v", "two",
                                trace.info().path + ": layers." + std::to_string(layer),
                                "write both in the same dtype"});
  range_elements_ = ChooseOptions().range_elements;
  if (on_device()) {
    const std::size_t free = scratch_->device().free_bytes();
    const MemoryPlan plan = memory(trace, layer, page_size);
    plan.require(free, scratch_->device().describe());
    range_elements_ = std::clamp(kLeastRange + static_cast<i64>(free - plan.total()) / kRangeElementBytes / 2,
                                 kLeastRange, kMostRange);
  }
  queries_ = {tensors_.q.data, tensors_.q.dtype, tokens_, nullptr};
  kv_ = {tensors_.k.data, tensors_.v.data, tensors_.k.dtype, tokens_};
  if (on_device()) {
    const auto upload = [&](Buffer<std::byte>& to, const Tensor& from, i64 heads) {
      const i64 bytes = heads * tokens_ * layer_.head_dim * size_of(from.dtype);
      to = Buffer<std::byte>(scratch_->shared_device(), bytes);
      scratch_->device().copy_in(to.data(), from.data, static_cast<std::size_t>(bytes));
      return to.data();
    };
    queries_.data = upload(device_q_, tensors_.q, layer_.num_qo_heads);
    kv_.k = upload(device_k_, tensors_.k, layer_.num_kv_heads);
    kv_.v = upload(device_v_, tensors_.v, layer_.num_kv_heads);
  }
  pool_ = make_pool(scratch_->shared_device(), kMostParents + 2);
  dense_out_.resize(static_cast<std::size_t>(layer_.num_qo_heads * tokens_ * layer_.head_dim));
  dense_lse_.resize(static_cast<std::size_t>(layer_.num_qo_heads * tokens_));
  if (!on_device()) {
    attend(dense_attention(0, tokens_), dense_out_.data(), dense_lse_.data());
    setup_lse_ = dense_lse_.data();
  } else {
    const Scratch::Frame frame(*scratch_);
    Attention dense = dense_attention(0, tokens_);
    dense.precise = true;
    const std::size_t bytes = plan_cuda_attention(dense).workspace_bytes;
    device_lse_ = Buffer<float>(scratch_->shared_device(), static_cast<i64>(dense_lse_.size()));
    float* out = scratch_->take<float>(static_cast<i64>(dense_out_.size()));
    attend_cuda(dense, out, device_lse_.data(), scratch_->take<std::byte>(static_cast<i64>(bytes)), bytes,
                scratch_->device().stream());
    scratch_->device().copy_out(dense_out_.data(), out, dense_out_.size() * sizeof(float));
    scratch_->device().copy_out(dense_lse_.data(), device_lse_.data(), dense_lse_.size() * sizeof(float));
    setup_lse_ = device_lse_.data();
  }
  queries_.dense_lse = setup_lse_;
}

/// Parents share nothing with each other; beside them there is one working fork, and what it copies of a page it is
/// about to drop.
std::shared_ptr<PagePool> LayerReplay::make_pool(const std::shared_ptr<Device>& device, i64 caches) const {
  const i64 pages_a_head = (tokens_ + page_size_ - 1) / page_size_;
  return std::make_shared<PagePool>(device, page_size_, layer_.head_dim, tensors_.k.dtype,
                                    caches * layer_.num_kv_heads * (pages_a_head + 1), poison_);
}

MemoryPlan LayerReplay::memory(const Trace& trace, int layer, i32 page_size) {
  const Layer l = trace.info().layer(layer);
  const LayerTensors tensors = trace.unchecked_layer(layer);
  const i64 tokens = trace.info().tokens(), pages = (tokens + page_size - 1) / page_size + 1;
  const i64 q_elements = l.num_qo_heads * tokens * l.head_dim, kv_elements = l.num_kv_heads * tokens * l.head_dim;
  MemoryPlan plan;
  const auto add = [&](const char* what, i64 bytes) { plan.add(what, static_cast<std::size_t>(bytes)); };
  add("queries, keys and values", q_elements * size_of(tensors.q.dtype) + 2 * kv_elements * size_of(tensors.k.dtype));
  add("KV caches", (kMostParents + 2) * l.num_kv_heads * pages * page_size *
                       (2 * l.head_dim * size_of(tensors.k.dtype) + static_cast<i64>(sizeof(i32))));
  // Of a method and, where it has log weights, of the same set without them.
  add("attention's results", 2 * (q_elements + l.num_qo_heads * tokens) * static_cast<i64>(sizeof(float)));
  constexpr i64 kKeyLists = i64{512} << 20, kOracle = i64{2} << 30;  // at most, on long layers
  const i64 rows = l.num_qo_heads * ((tokens + 63) / 64);
  add("key lists", std::min(kKeyLists, rows * tokens * static_cast<i64>(sizeof(i32))));
  add("matched oracle", std::min(kOracle, rows * tokens * 24) + 16 * l.num_qo_heads * tokens);
  add("operations", static_cast<i64>(ops_workspace_bytes(true, l, 1, tokens, tokens)));
  add("scores and lists", kLeastRange * kRangeElementBytes);
  return plan;
}

LayerSetup LayerReplay::setup(std::uint64_t seed, bool check) const {
  LayerSetup s;
  s.layer = layer_;
  s.queries = queries_;
  s.kv = kv_;
  s.rope = &rope_;
  s.seed = seed;
  s.check = check;
  s.max_tokens = tokens_;
  s.scratch = scratch_;
  s.prompt_tokens = prompt_tokens_;
  if (question_) {
    s.question_begin = question_->begin;
    s.question_tokens = question_->end - question_->begin;
  }
  s.wo = &tensors_.wo;
  s.k_pre = &tensors_.k_pre;
  return s;
}

ChooseOptions LayerReplay::choose_options(bool keep_lists, bool keep_scores) const {
  ChooseOptions options;
  options.check = true;
  options.keep_lists = keep_lists;
  options.keep_scores = keep_scores;
  options.range_elements = range_elements_;
  return options;
}

KvCache& LayerReplay::find_or_make(Parents& parents, const std::shared_ptr<PagePool>& pool, const KvSource& source,
                                   i64 tokens) {
  const auto found = parents.find(tokens);
  if (found != parents.end()) return found->second;
  if (parents.size() == kMostParents) parents.clear();
  KvCache cache(pool, layer_.num_kv_heads, tokens_);
  cache.append(source.k, source.v, source.dtype, tokens_ * layer_.head_dim, tokens, 0);
  return parents.emplace(tokens, std::move(cache)).first->second;
}

KvCache& LayerReplay::parent(i64 tokens) { return find_or_make(parents_, pool_, kv_, tokens); }

KvCache LayerReplay::fork(i64 tokens) { return parent(tokens).fork(); }

Attention LayerReplay::dense_attention(i64 begin, i64 end) {
  return Attention{layer_, parent(end).view(), queries_.span(layer_, begin, end)};
}

Attention LayerReplay::host_attention(i64 begin, i64 end) {
  if (!on_device()) return dense_attention(begin, end);
  if (!host_pool_) host_pool_ = make_pool(cpu_device(), kMostParents);
  const QuerySource queries{tensors_.q.data, tensors_.q.dtype, tokens_, nullptr};
  const KvSource kv{tensors_.k.data, tensors_.v.data, tensors_.k.dtype, tokens_};
  return Attention{layer_, find_or_make(host_parents_, host_pool_, kv, end).view(), queries.span(layer_, begin, end)};
}

std::vector<float> LayerReplay::dense_out(i64 begin, i64 end) const {
  return slice(dense_out_, layer_.num_qo_heads, tokens_, layer_.head_dim, begin, end);
}
std::vector<float> LayerReplay::dense_lse(i64 begin, i64 end) const {
  return slice(dense_lse_, layer_.num_qo_heads, tokens_, 1, begin, end);
}

}  // namespace lacuna
