#include "lacuna/pipeline/layer_pipeline.hpp"

#include <algorithm>

#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/attention/extras.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "pipeline/row_kernels.hpp"

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
  return setup_.layer.sliding_window > 0 || runtime.resolved().keeps_dense(setup_.layer.index);
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
  Scratch& scratch = *setup_.scratch;
  for (const i32 g : sizes) {
    Dirty dirty = cache_.take_dirty(g);
    const Scratch::Frame frame(scratch);
    const std::size_t bytes = static_cast<std::size_t>(dirty.rows) * sizeof(i32);
    i32 *begin = scratch.take<i32>(dirty.rows), *end = scratch.take<i32>(dirty.rows);
    scratch.device().copy(begin, dirty.begin, bytes);  // the cache's own arrays may move when a side is touched
    scratch.device().copy(end, dirty.end, bytes);
    dirty.begin = begin;
    dirty.end = end;
    for (auto* r : {select_.get(), evict_.get()})
      if (r) r->index(cache_, span, dirty);
  }
}

void LayerPipeline::index_units(const CallSpan& span, const Dirty& units) {
  for (auto* r : {select_.get(), evict_.get()})
    if (r) r->index(cache_, span, units);
}

void LayerPipeline::attended(const CallSpan& span, const Selection* read, const float* out, const float* lse) {
  const Attended seen{read, setup_.queries.span(setup_.layer, span.begin, span.end), out, lse};
  for (auto* r : {select_.get(), evict_.get()})
    if (r && r->wants_attended()) r->attended(cache_, span, seen);
}

Choice LayerPipeline::choose_for(const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit) {
  if (select_ && !dense_layer(*select_))
    return choose(*select_, evict_ && span.phase == Phase::decode ? nullptr : allocate_.get(), cache_, setup_, span,
                  options, visit);
  return everything_for(span, options, visit);
}

Choice LayerPipeline::everything_for(const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit) {
  const i32 q_tile = span.phase == Phase::prefill ? kDenseTile : static_cast<i32>(span.end - span.begin);
  return choose_everything(cache_, setup_, span, q_tile, options, visit);
}

AttentionWork LayerPipeline::attend_to(const CallSpan& span, const Selection* read, AttendOptions how, float* out,
                                       float* lse) {
  const Attention a{setup_.layer, cache_.view(),      setup_.queries.span(setup_.layer, span.begin, span.end),
                    read,         how.ignore_weights, how.precise};
  Scratch& scratch = *setup_.scratch;
  const auto extras = [&] {
    if (!read || read->extra_capacity == 0 || how.ignore_weights) return;
    attend_extras(scratch.device(), a, scratch.take<float>(extras_workspace(a)), out, lse);
  };
  const Scratch::Frame frame(scratch);
  if (!scratch.on_device()) {
    const AttentionWork work = attend(a, out, lse);
    extras();
    return work;
  }
  const std::size_t bytes = plan_cuda_attention(a).workspace_bytes;
  attend_cuda(a, out, lse, scratch.take<std::byte>(static_cast<i64>(bytes)), bytes, scratch.device().stream());
  extras();
  AttentionWork work;  // the kernels count no pairs
  if (read)
    work.sparse_rows = read->rows.count() * (read->rows.per_query_head ? 1 : setup_.layer.group());
  else
    work.dense_rows = setup_.layer.num_qo_heads;
  return work;
}

namespace {

/// Results of a step where attention writes them, and at last on the host.
class Results {
 public:
  Results(Scratch& scratch, i64 rows, i64 head_dim) : scratch_(scratch), rows_(rows), head_dim_(head_dim) {}

  void make(std::vector<float>& out, std::vector<float>& lse) {
    out.resize(static_cast<std::size_t>(rows_ * head_dim_));
    lse.resize(static_cast<std::size_t>(rows_));
    this->out = scratch_.on_device() ? scratch_.take<float>(rows_ * (head_dim_ + 1)) : out.data();
    this->lse = scratch_.on_device() ? this->out + rows_ * head_dim_ : lse.data();
  }
  bool made() const { return out != nullptr; }
  void fetch(std::vector<float>& to_out, std::vector<float>& to_lse) const {
    if (!made() || !scratch_.on_device()) return;
    if (rows_ * head_dim_ > kOneCopy) {
      scratch_.device().copy_out(to_out.data(), out, to_out.size() * sizeof(float));
      scratch_.device().copy_out(to_lse.data(), lse, to_lse.size() * sizeof(float));
      return;
    }
    const std::vector<float> both = scratch_.read(out, rows_ * (head_dim_ + 1));  // waits once
    std::copy_n(both.begin(), to_out.size(), to_out.begin());
    std::copy_n(both.begin() + rows_ * head_dim_, to_lse.size(), to_lse.begin());
  }

  float *out = nullptr, *lse = nullptr;

 private:
  static constexpr i64 kOneCopy = i64{1} << 20;  // floats that are worth another copy on the host
  Scratch& scratch_;
  i64 rows_, head_dim_;
};

}  // namespace

Step LayerPipeline::choose_and_attend(const CallSpan& span, bool everything) {
  Step step;
  const Layer& layer = setup_.layer;
  const Queries q = setup_.queries.span(layer, span.begin, span.end);
  Scratch& scratch = *setup_.scratch;
  const Scratch::Frame frame(scratch);
  Results weighted(scratch, q.heads * q.count, q.head_dim), plain(scratch, q.heads * q.count, q.head_dim);
  weighted.make(step.out, step.lse);
  const bool plain_too =
      !everything && select_ && !dense_layer(*select_) && (select_->weighs() || select_->adds_extras());
  if (plain_too) plain.make(step.unweighted_out, step.unweighted_lse);
  const auto visit = [&](const Selection& chosen) {
    const Selection* read = layer.sliding_window == 0 ? &chosen : nullptr;
    const AttentionWork work = attend_to(span, read, {false, true}, weighted.out, weighted.lse);
    step.work.dense_rows += work.dense_rows;
    step.work.sparse_rows += work.sparse_rows;
    step.work.pairs += work.pairs;
    if (plain_too) attend_to(span, read, {true, true}, plain.out, plain.lse);
    attended(span, read, weighted.out, weighted.lse);
  };
  step.choice = everything ? everything_for(span, options_, visit) : choose_for(span, options_, visit);
  weighted.fetch(step.out, step.lse);
  plain.fetch(step.unweighted_out, step.unweighted_lse);

  const Choice& choice = step.choice;
  if (scratch.on_device()) {
    const i64 first = cache_.length(0) - q.count;
    step.work.pairs = layer.sliding_window > 0
                          ? layer.num_qo_heads * capped_pairs(layer.sliding_window, first, first + q.count)
                          : static_cast<i64>(choice.budget.realised_pairs);
  }
  std::vector<std::vector<i32>> positions;
  for (i32 h = 0; h < layer.num_kv_heads; ++h) positions.push_back(cache_.positions(h));
  for (std::size_t i = 0; i < choice.sets.size(); ++i) {
    const auto head = static_cast<i32>(i) / choice.tiles(), tile = static_cast<i32>(i) % choice.tiles();
    const auto& of_head = positions[static_cast<std::size_t>(head / layer.group())];
    const i64 first = static_cast<i64>(of_head.size()) - q.count,
              begin = first + static_cast<i64>(tile) * choice.q_tile();
    step.position_sets.push_back(
        to_positions(choice.sets[i], of_head, begin, std::min<i64>(begin + choice.q_tile(), first + q.count)));
  }
  return step;
}

Step LayerPipeline::prefill() {
  const i64 n = cache_.length(0);
  const CallSpan span{Phase::prefill, -1, 0, n};
  prepare(span, Phase::prefill);
  if (select_ && !dense_layer(*select_)) refresh_sides(span);
  return choose_and_attend(span, false);
}

void LayerPipeline::observe_prefill(const std::vector<float>& out, const std::vector<float>& lse) {
  const CallSpan span{Phase::prefill, -1, 0, cache_.length(0)};
  prepare(span, Phase::decode);
  refresh_sides(span);
  if (!evict_ || !evict_->wants_attended()) return;
  Scratch& scratch = *setup_.scratch;
  const Scratch::Frame frame(scratch);
  const auto there = [&](const std::vector<float>& host) {
    return scratch.on_device() ? scratch.take_copy(host.data(), static_cast<i64>(host.size())) : host.data();
  };
  const Attended seen{nullptr, setup_.queries.span(setup_.layer, span.begin, span.end), there(out), there(lse)};
  evict_->attended(cache_, span, seen);
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
  carry_out(span, e);
  if (e.limited) capacity_ = e.target_tokens;
  return e;
}

void LayerPipeline::carry_out(const CallSpan& span, Eviction& e) {
  if ((evict_ && evict_->rewrites()) || (allocate_ && allocate_->rewrites()))
    rewrite_kept(span, e);
  else
    cache_.retain(e.kept);
  follow_slots();
}

void LayerPipeline::rewrite_kept(const CallSpan& span, Eviction& e) {
  constexpr int kNanByte = 0xff;
  Scratch& scratch = *setup_.scratch;
  const Scratch::Frame frame(scratch);
  const Paged kv = cache_.view();
  const i64 rows = kv.rows, slots = kv.max_length, d = kv.head_dim;
  std::vector<i32> count, kept(static_cast<std::size_t>(rows * slots), 0), length;
  for (i64 h = 0; h < rows; ++h) {
    const std::vector<i32>& list = e.kept[static_cast<std::size_t>(h)];
    count.push_back(static_cast<i32>(list.size()));
    length.push_back(static_cast<i32>(cache_.length(static_cast<i32>(h))));
    std::copy(list.begin(), list.end(), kept.begin() + h * slots);
  }
  const Rewrite rewrite{kv.rows,
                        kv.head_dim,
                        slots,
                        scratch.take_copy(count.data(), rows),
                        scratch.take_copy(kept.data(), rows * slots),
                        scratch.take<float>(rows * slots * d),
                        scratch.take<float>(rows * slots * d),
                        scratch.take_zero<i32>(rows),
                        scratch.take_zero<u8>(rows * d)};
  for (float* to : {rewrite.k, rewrite.v})
    scratch.device().fill(to, setup_.check ? kNanByte : 0, static_cast<std::size_t>(rows * slots * d) * sizeof(float));
  unpack_cache(scratch.device(), kv, rewrite);
  StrategyRuntime* writer = nullptr;
  for (StrategyRuntime* s : {evict_.get(), allocate_.get()})
    if (s && s->rewrites()) {
      s->rewrite(cache_, span, rewrite);
      writer = s;
    }

  u8* bad = scratch.take<u8>(rows * slots);
  settle_rewrite(scratch.device(), rewrite, bad);
  std::vector<i32> until = scratch.read(rewrite.channels_dropped_until, rows);
  std::vector<u8> drop = scratch.read(rewrite.drop_channel, rows * d);
  if (options_.check) {
    const std::vector<u8> not_finite = scratch.read(bad, rows * slots);
    Rewrite host = rewrite;
    host.kept_count = count.data();
    host.kept = kept.data();
    host.channels_dropped_until = until.data();
    host.drop_channel = drop.data();
    check_rewrite(writer->culprit("rewrite"), host, not_finite.data(), length.data());
  }
  cache_.retain(e.kept);
  cache_.overwrite(rewrite.k, rewrite.v, rewrite.kept, slots);
  std::vector<i32> channels;
  for (i64 h = 0; h < rows; ++h) {
    const auto& list = e.kept[static_cast<std::size_t>(h)];
    i32& end = until[static_cast<std::size_t>(h)];
    end = static_cast<i32>(std::lower_bound(list.begin(), list.end(), end) - list.begin());
    channels.push_back(static_cast<i32>(std::count(drop.begin() + h * d, drop.begin() + (h + 1) * d, u8{1})));
    e.dropped_tokens += 0.5 * end * channels.back() / static_cast<double>(d);
  }
  if (e.dropped_tokens > 0) cache_.drop_key_channels(until, channels);
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
  const i64 elements = layer.num_qo_heads * tokens * d;
  if (host_queries_.empty())
    host_queries_ = setup_.scratch->read(static_cast<const std::byte*>(original_queries_.data),
                                         elements * size_of(original_queries_.dtype));
  std::vector<float> turned(static_cast<std::size_t>(elements));
  for (i64 h = 0; h < layer.num_qo_heads; ++h) {
    const i32 head = static_cast<i32>(h / layer.group());
    const std::vector<i32> positions = cache_.positions(head);
    const double delta = static_cast<double>(cache_.length(head) - 1 - positions.back());
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < tokens; ++i) {
      float* row = turned.data() + (h * tokens + i) * d;
      for (i64 c = 0; c < d; ++c)
        row[c] = load(host_queries_.data(), original_queries_.dtype, (h * tokens + i) * d + c);
      setup_.rope->shift(row, delta);
    }
  }
  if (turned_queries_.size() != elements) turned_queries_ = Buffer<float>(setup_.scratch->shared_device(), elements);
  setup_.scratch->device().copy_in(turned_queries_.data(), turned.data(), turned.size() * sizeof(float));
  setup_.queries.data = turned_queries_.data();
  setup_.queries.dtype = Dtype::f32;
  for (auto* r : {select_.get(), evict_.get(), allocate_.get()})
    if (r) r->set_queries(setup_.queries);
}

Step LayerPipeline::read_cached(i64 begin, i64 end) {
  const CallSpan span{Phase::decode, 0, begin, end};
  return choose_and_attend(span, true);
}

Step LayerPipeline::step(i64 position, i64 step) {
  append(position, 1);
  const CallSpan span{Phase::decode, step, position, position + 1};
  prepare(span, Phase::decode);
  refresh_sides(span);
  Step out = choose_and_attend(span, false);
  evict_if_due(span);
  return out;
}

void LayerPipeline::follow(i64 position) {
  append(position, 1);
  const CallSpan span{Phase::decode, since_cut_, position, position + 1};
  prepare(span, Phase::decode);
  refresh_sides(span);
  choose_and_attend(span, true);
  evict_if_due(span);
}

void LayerPipeline::evict_if_due(const CallSpan& span) {
  ++since_cut_;
  if (!evicts_while_decoding() || dense_layer(*evict_) || since_cut_ % evict_->plan().evict_every != 0) return;
  const bool own_size = !evict_->entry().takes_budget && evict_->instance().has_retain();
  i64 cached = 0;  // an allocator may give one head more than its capacity: the layer's sum is what counts
  for (i32 h = 0; h < setup_.layer.num_kv_heads; ++h) cached += cache_.length(h);
  if (!own_size && (capacity_ < 0 || cached <= capacity_ * setup_.layer.num_kv_heads)) return;
  Eviction e = decide_eviction(evict_.get(), allocate_.get(), cache_, setup_, span, capacity_, options_);
  carry_out(span, e);
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
