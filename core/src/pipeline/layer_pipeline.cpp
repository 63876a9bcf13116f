#include "lacuna/pipeline/layer_pipeline.hpp"

#include <algorithm>

#include "lacuna/base/error.hpp"

namespace lacuna {
using namespace sdk;

namespace {
std::unique_ptr<StrategyRuntime> make(const Resolved* resolved, Purpose purpose, const LayerSetup& setup,
                                      const char* role) {
  return resolved ? std::make_unique<StrategyRuntime>(*resolved, purpose, setup, role) : nullptr;
}
constexpr i32 kDenseTile = 64;

/// A set in slots of a cache as original positions; exact parts become explicit where slots have moved.
RowSet to_positions(const RowSet& set, const std::vector<i32>& positions, i64 begin, i64 end) {
  if (positions.back() == static_cast<i32>(positions.size()) - 1) return set;
  RowSet out;
  for (const i32 slot : set.cells(begin, end)) {
    out.slots.push_back(positions[static_cast<std::size_t>(slot)]);
    if (!set.log_weight.empty()) out.log_weight.push_back(set.weight(slot));
  }
  return out;
}
}  // namespace

LayerPipeline::LayerPipeline(const Roles& roles, const LayerSetup& setup, KvCache cache, const ChooseOptions& options)
    : setup_(setup),
      original_queries_(setup.queries),
      options_(options),
      select_(make(roles.select, Purpose::select, setup, "select")),
      evict_(make(roles.evict, Purpose::evict, setup, "evict")),
      allocate_(make(roles.allocate, roles.evict ? Purpose::evict : Purpose::select, setup, "allocate")),
      cache_(std::move(cache)) {
  compacted_ = evict_ && evict_->resolved().shared.value("positions", std::string("original")) == "compacted";
}

bool LayerPipeline::dense_layer(const StrategyRuntime& runtime) const {
  const auto layers = runtime.resolved().dense_layers();
  return setup_.layer.sliding_window > 0 || std::find(layers.begin(), layers.end(), setup_.layer.index) != layers.end();
}

void LayerPipeline::prepare(const CallSpan& span, Phase select_phase) {
  for (auto* r : {select_.get(), evict_.get(), allocate_.get()}) {
    if (!r) continue;
    const BudgetSpec& b = r->resolved().budget;
    CallSpan planned = span;
    if (r == select_.get()) planned.phase = select_phase;
    r->prepare(cache_, planned, b.kind == BudgetSpec::Kind::tokens ? static_cast<i64>(b.value) : -1);
  }
}

void LayerPipeline::refresh_sides(const CallSpan& span) {
  std::vector<i32> sizes;
  for (auto* r : {select_.get(), evict_.get()})
    if (r)
      for (const i32 g : r->granularities()) sizes.push_back(g);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  for (const i32 g : sizes) {
    Dirty dirty = cache_.take_dirty(g);
    const std::vector<i32> begin(dirty.begin, dirty.begin + dirty.rows), end(dirty.end, dirty.end + dirty.rows);
    dirty.begin = begin.data();  // the cache's own arrays may move when a side is touched
    dirty.end = end.data();
    for (auto* r : {select_.get(), evict_.get()})
      if (r) r->index(cache_, span, dirty);
  }
}

Step LayerPipeline::attend_choice(const CallSpan& span, Choice choice) {
  Step out;
  const Queries q = setup_.queries.span(setup_.layer, span.begin, span.end);
  out.out.resize(static_cast<std::size_t>(q.heads * q.count * q.head_dim));
  out.lse.resize(static_cast<std::size_t>(q.heads * q.count));
  Attention a{setup_.layer, cache_.view(), q};
  if (setup_.layer.sliding_window == 0) a.read = &choice.selection.view();
  out.work = attend(a, out.out.data(), out.lse.data());
  if (a.read && (a.read->token_log_weight || a.read->piece_log_weight)) {
    a.ignore_weights = true;
    out.unweighted_out.resize(out.out.size());
    std::vector<float> lse(out.lse.size());
    attend(a, out.unweighted_out.data(), lse.data());
  }
  const Layer& layer = setup_.layer;
  std::vector<std::vector<i32>> positions;
  for (i32 h = 0; h < layer.num_kv_heads; ++h) positions.push_back(cache_.positions(h));
  for (std::size_t i = 0; i < choice.sets.size(); ++i) {
    const auto head = static_cast<i32>(i) / choice.tiles, tile = static_cast<i32>(i) % choice.tiles;
    const auto& of_head = positions[static_cast<std::size_t>(head / layer.group())];
    const i64 first = static_cast<i64>(of_head.size()) - q.count,
              begin = first + static_cast<i64>(tile) * choice.q_tile;
    out.position_sets.push_back(
        to_positions(choice.sets[i], of_head, begin, std::min<i64>(begin + choice.q_tile, first + q.count)));
  }
  const Attended seen{a.read, q, out.out.data(), out.lse.data()};
  for (auto* r : {select_.get(), evict_.get()})
    if (r && r->wants_attended()) r->attended(cache_, span, seen);
  out.choice = std::move(choice);
  return out;
}

Step LayerPipeline::prefill() {
  const i64 n = cache_.length(0);
  const CallSpan span{Phase::prefill, -1, 0, n};
  prepare(span, Phase::prefill);
  if (!select_ || dense_layer(*select_))
    return attend_choice(span, choose_everything(cache_, setup_, span, kDenseTile));
  refresh_sides(span);
  return attend_choice(span, choose(*select_, allocate_.get(), cache_, setup_, span, options_));
}

void LayerPipeline::observe_prefill(const float* out, const float* lse) {
  const CallSpan span{Phase::prefill, -1, 0, cache_.length(0)};
  prepare(span, Phase::decode);
  refresh_sides(span);
  const Attended seen{nullptr, setup_.queries.span(setup_.layer, span.begin, span.end), out, lse};
  if (evict_ && evict_->wants_attended()) evict_->attended(cache_, span, seen);
}

Eviction LayerPipeline::evict_at_cut() {
  const CallSpan span{Phase::prefill, -1, 0, cache_.length(0)};
  prepare(span, Phase::decode);
  Eviction e;
  const bool dense = setup_.layer.sliding_window > 0 || (evict_ && dense_layer(*evict_));
  if (dense || (!evict_ && !allocate_)) {
    e.kept_tokens = e.cached_tokens = static_cast<double>(span.end * setup_.layer.num_kv_heads);
    return e;
  }
  refresh_sides(span);
  e = decide_eviction(evict_.get(), allocate_.get(), cache_, setup_, span, -1, options_);
  cache_.retain(e.kept);
  if (e.limited) capacity_ = e.target_tokens;
  follow_slots();
  return e;
}

void LayerPipeline::append(i64 begin, i64 n) {
  const i64 d = setup_.layer.head_dim;
  const i64 offset = begin * d * size_of(setup_.kv.dtype);
  cache_.append(static_cast<const std::byte*>(setup_.kv.k) + offset,
                static_cast<const std::byte*>(setup_.kv.v) + offset, setup_.kv.dtype, setup_.kv.tokens * d, n, begin);
  follow_slots();
}

/// positions = compacted: keys sit at their slots, and so do the queries still to come.
void LayerPipeline::follow_slots() {
  if (!compacted_) return;
  cache_.compact_positions(*setup_.rope);
  const Layer& layer = setup_.layer;
  const i64 d = layer.head_dim, tokens = setup_.queries.tokens;
  const Queries q = original_queries_.span(layer, 0, tokens);
  turned_queries_.resize(static_cast<std::size_t>(layer.num_qo_heads * tokens * d));
  for (i64 h = 0; h < layer.num_qo_heads; ++h) {
    const i32 head = static_cast<i32>(h / layer.group());
    const std::vector<i32> positions = cache_.positions(head);
    const double delta = static_cast<double>(cache_.length(head) - 1 - positions.back());
    for (i64 i = 0; i < tokens; ++i) {
      float* row = turned_queries_.data() + (h * tokens + i) * d;
      for (i64 c = 0; c < d; ++c) row[c] = q.at(0, h, i, c);
      setup_.rope->shift(row, delta);
    }
  }
  setup_.queries.data = turned_queries_.data();
  setup_.queries.dtype = Dtype::f32;
  for (auto* r : {select_.get(), evict_.get(), allocate_.get()})
    if (r) r->set_queries(setup_.queries);
}

Step LayerPipeline::read_cached(i64 begin, i64 end) {
  const CallSpan span{Phase::decode, 0, begin, end};
  return attend_choice(span, choose_everything(cache_, setup_, span, static_cast<i32>(end - begin)));
}

Step LayerPipeline::step(i64 position, i64 step) {
  append(position, 1);
  const CallSpan span{Phase::decode, step, position, position + 1};
  prepare(span, Phase::decode);
  refresh_sides(span);
  const bool everything = !select_ || dense_layer(*select_);
  Step out = attend_choice(
      span, everything ? choose_everything(cache_, setup_, span, 1)
                       : choose(*select_, evict_ ? nullptr : allocate_.get(), cache_, setup_, span, options_));
  evict_if_due(span);
  return out;
}

void LayerPipeline::follow(i64 position) {
  append(position, 1);
  const CallSpan span{Phase::decode, since_cut_, position, position + 1};
  prepare(span, Phase::decode);
  refresh_sides(span);
  attend_choice(span, choose_everything(cache_, setup_, span, 1));
  evict_if_due(span);
}

void LayerPipeline::evict_if_due(const CallSpan& span) {
  ++since_cut_;
  if (!evicts_while_decoding() || dense_layer(*evict_) || since_cut_ % evict_->plan().evict_every != 0) return;
  i64 cached = 0;  // an allocator may give one head more than its capacity: the layer's sum is what counts
  for (i32 h = 0; h < setup_.layer.num_kv_heads; ++h) cached += cache_.length(h);
  if (capacity_ < 0 || cached <= capacity_ * setup_.layer.num_kv_heads) return;
  cache_.retain(decide_eviction(evict_.get(), allocate_.get(), cache_, setup_, span, capacity_, options_).kept);
  follow_slots();
}

Cost LayerPipeline::selection_cost() const {
  Cost total;
  for (const auto* r : {select_.get(), evict_.get(), allocate_.get()}) {
    if (!r) continue;
    const Cost c = r->cost();
    total.bytes += c.bytes;
    total.flops += c.flops;
  }
  return total;
}

}  // namespace lacuna
