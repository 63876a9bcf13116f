#include "lacuna/pipeline/runtime.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/evict.hpp"
#include "pipeline/positions.hpp"
#include "pipeline/row_kernels.hpp"

namespace lacuna {
using namespace sdk;

Queries QuerySource::span(const Layer& layer, i64 begin, i64 end) const {
  Queries q{};
  q.dtype = dtype;
  q.seqs = 1;
  q.heads = layer.num_qo_heads;
  q.head_dim = layer.head_dim;
  q.count = end - begin;
  q.first_position = begin;
  q.row_stride = layer.head_dim;
  q.head_stride = tokens * layer.head_dim;
  q.seq_stride = q.head_stride * layer.num_qo_heads;
  q.data = static_cast<const std::byte*>(data) + begin * layer.head_dim * size_of(dtype);
  return q;
}

namespace {
i32 report(sdk::Error* error, const std::string& text) {
  error->code = 1;
  std::snprintf(error->text, sizeof error->text, "%s", text.c_str());
  return 1;
}

i64 splitmix(i64 x) {
  std::uint64_t z = static_cast<std::uint64_t>(x) + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<i64>(z ^ (z >> 31));
}
}  // namespace

sdk::Call StrategyRuntime::facts_of(const KvCache& cache, const CallSpan& span) const {
  sdk::Call call{};
  call.layer = setup_.layer;
  call.phase = span.phase;
  call.purpose = purpose_;
  call.step = span.step;
  call.num_seqs = 1;
  call.kv = cache.view();
  call.gqa = common_.gqa;
  call.random.key = static_cast<u64>(splitmix(static_cast<i64>(setup_.seed) * 1000003 + setup_.layer.index));
  call.random.step = static_cast<u64>(span.step + 1);
  call.on_device = setup_.scratch->on_device();
  call.stream = setup_.scratch->device().stream();
  call.prompt_tokens = setup_.prompt_tokens;
  call.question_begin = setup_.question_begin;
  call.question_tokens = setup_.question_tokens;
  return call;
}

std::unique_ptr<CoreOps> StrategyRuntime::ops_for(const sdk::Call& call) {
  const std::size_t bytes =
      ops_workspace_bytes(call.on_device != 0, call.layer, 1, setup_.max_tokens, setup_.queries.tokens);
  return make_ops(call, cost_, bytes > 0 ? setup_.scratch->ops_workspace(bytes) : nullptr, bytes);
}

/// The core's side of one call.
class StrategyRuntime::Services final : public sdk::Services {
 public:
  Services(StrategyRuntime& self, KvCache& cache, const CallSpan& span)
      : self_(self),
        cache_(cache),
        span_(span),
        scratch_(*self.setup_.scratch),
        frame_(scratch_),
        call_(self.facts_of(cache, span)),
        ops_(self.ops_for(call_)) {}

  const Call& call() const noexcept override { return call_; }
  CoreOps& ops() noexcept override { return *ops_; }

  i32 array(ArrayKind kind, const char* name, i64 bytes, Array* out, sdk::Error* error) noexcept override try {
    switch (kind) {
      case ArrayKind::side: *out = cache_.side(self_.role_ + "/" + name); return 0;
      case ArrayKind::state: return state(name, out, error);
      case ArrayKind::workspace: return carve(bytes, out, error);
    }
    return report(error, "unknown kind of array");
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 queries(Span span, i64 n, Queries* out, sdk::Error* error) noexcept override try {
    i64 begin = span_.begin;
    if (span == Span::seen) begin = 0;
    if (span == Span::last) begin = std::max<i64>(0, span_.end - n);
    *out = self_.setup_.queries.span(self_.setup_.layer, begin, span_.end);
    if (self_.setup_.check) poison(out);
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 oracle_mass(Scores* out, sdk::Error* error) noexcept override try {
    if (!self_.entry().clairvoyant) return report(error, "asks for the true mass without declaring clairvoyant");
    if (self_.purpose_ == Purpose::select) {
      ops_->unit_mass(self_.setup_.queries.span(self_.setup_.layer, span_.begin, span_.end), *out);
      return 0;
    }
    return future_mass(out, error);
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 base_scores(Scores* out, sdk::Error* error) noexcept override try {
    if (!self_.base_) return report(error, "asks for a base without being a wrapper");
    if (self_.purpose_ == Purpose::evict)
      rank_scores(*self_.base_, cache_, self_.setup_, span_, *out);
    else
      self_.base_->score(cache_, span_, *out);
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 base_scores_of(const Subset& subset, Scores* out, sdk::Error* error) noexcept override try {
    if (!self_.base_) return report(error, "asks for a base without being a wrapper");
    if (self_.purpose_ != Purpose::evict) return report(error, "scores of a subset are for eviction only");
    rank_subset(*self_.base_, cache_, self_.setup_, span_, subset, *out);
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  void charge(double bytes, double flops) noexcept override {
    self_.cost_.bytes += bytes;
    self_.cost_.flops += flops;
  }

  i32 rotations(i64 begin, i64 n, float* out, sdk::Error* error) noexcept override try {
    write_rotations(scratch_.device(), rotation(), begin, n, self_.setup_.layer.head_dim, out);
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 unrotated_queries(Span span, i64 n, Queries* out, sdk::Error* error) noexcept override try {
    if (const i32 code = queries(span, n, out, error)) return code;
    float* turned = scratch_.take<float>(static_cast<i64>(out->seqs) * out->heads * out->count * out->head_dim);
    unrotate_queries(scratch_.device(), rotation(), *out, turned);
    out->data = turned;
    out->dtype = Dtype::f32;
    out->row_stride = out->head_dim;
    out->head_stride = out->count * out->head_dim;
    out->seq_stride = out->heads * out->head_stride;
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 unrotated_keys(Array* out, sdk::Error* error) noexcept override try {
    const Paged& kv = call_.kv;
    float* turned = scratch_.take<float>(static_cast<i64>(kv.rows) * kv.max_length * kv.head_dim);
    if (const Tensor* stored = self_.setup_.k_pre; stored && stored->present()) {
      const i64 tokens = stored->shape[1];
      gather_keys(scratch_.device(), {on_device("k_pre", *stored), stored->dtype, tokens}, kv, turned);
    } else {
      unrotate_keys(scratch_.device(), rotation(), kv, turned);
    }
    const i64 d = kv.head_dim, n = kv.max_length;
    *out = Array{turned, Dtype::f32, 3, {kv.rows, n, d, 0}, {n * d, d, 1, 0}};
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 output_projection(Array* out, sdk::Error* error) noexcept override try {
    *out = Array{};
    const Tensor* wo = self_.setup_.wo;
    if (!wo || !wo->present()) return 0;
    *out = Array{const_cast<void*>(on_device("wo", *wo)),
                 wo->dtype,
                 2,
                 {wo->shape[0], wo->shape[1], 0, 0},
                 {wo->shape[1], 1, 0, 0}};
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 data(const char* param, const char* array, i32 layer, Array* out, sdk::Error* error) noexcept override try {
    *out = Array{};
    const auto& files = self_.resolved().data;
    const auto file = files.find(param);
    if (file == files.end()) return 0;
    const CalibrationArray* found = file->second->find(layer, array);
    if (!found) return 0;
    out->dtype = Dtype::f32;
    out->rank = static_cast<i32>(found->shape.size());
    i64 stride = 1;
    for (i32 i = out->rank - 1; i >= 0; --i) {
      out->extent[i] = found->shape[static_cast<std::size_t>(i)];
      out->stride[i] = stride;
      stride *= out->extent[i];
    }
    const std::string key = std::string(param) + '/' + array + '/' + std::to_string(layer);
    out->data = const_cast<void*>(uploaded(key, found->values.data(), stride * 4));
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

  i32 carried(const char* name, Dtype dtype, i64 elements, Array* out, sdk::Error* error) noexcept override try {
    if (!self_.setup_.carried) return report(error, "layers stand alone here: nothing is carried between them");
    const std::string key = self_.role_ + '/' + name + '/' + std::to_string(span_.step);
    void* data = self_.setup_.carried->array(key, elements * size_of(dtype), scratch_.shared_device());
    *out = Array{data, dtype, 1, {elements, 0, 0, 0}, {1, 0, 0, 0}};
    return 0;
  } catch (const std::exception& e) {
    return report(error, e.what());
  }

 private:
  Rotation rotation() {
    if (self_.turned_)
      throw lacuna::Error(Problem{"what was before RoPE is not known once keys were rotated to their slots", "", "",
                                  "positions = compacted", "use positions = \"original\" beside later evictions"});
    if (!self_.setup_.rope) throw lacuna::Error(Problem{"no rotary positions are known here", "", "", "", ""});
    const std::vector<double>& frequency = self_.setup_.rope->frequencies();
    const auto bytes = static_cast<i64>(frequency.size() * sizeof(double));
    return {static_cast<const double*>(uploaded("rope", frequency.data(), bytes)), self_.setup_.rope->scale()};
  }

  /// Host memory where the call can read it; copied to a device once.
  const void* uploaded(const std::string& key, const void* host, i64 bytes) {
    if (!scratch_.on_device()) return host;
    auto& buffer = self_.uploads_[key];
    if (buffer.size() != bytes) {
      buffer = Buffer<std::byte>(scratch_.shared_device(), bytes);
      scratch_.device().copy_in(buffer.data(), host, static_cast<std::size_t>(bytes));
    }
    return buffer.data();
  }
  const void* on_device(const char* key, const Tensor& t) {
    return uploaded(key, t.data, t.elements() * size_of(t.dtype));
  }

  i32 state(const char* name, Array* out, sdk::Error* error) {
    for (i32 i = 0; i < self_.plan_.num_states; ++i) {
      const State& declared = self_.plan_.states[i];
      if (std::strcmp(declared.name, name) != 0) continue;
      auto& buffer = self_.states_[name];
      if (const i64 bytes = declared.elements * size_of(declared.dtype); buffer.size() != bytes) {
        buffer = Buffer<std::byte>(scratch_.shared_device(), bytes);
        scratch_.device().fill(buffer.data(), 0, static_cast<std::size_t>(bytes));
      }
      *out = Array{buffer.data(), declared.dtype, 2, {1, declared.elements, 0, 0}, {declared.elements, 1, 0, 0}};
      return 0;
    }
    return report(error, std::string("state '") + name + "' was not declared in plan()");
  }

  i32 carve(i64 bytes, Array* out, sdk::Error* error) {
    if (asked_ + bytes > self_.plan_.workspace_bytes)
      return report(error, "workspace of " + std::to_string(self_.plan_.workspace_bytes) +
                               " bytes asked for in plan() is " +
                               std::to_string(asked_ + bytes - self_.plan_.workspace_bytes) + " bytes short");
    asked_ += bytes;
    *out = Array{scratch_.take_zero<std::byte>(bytes), Dtype::u8, 1, {bytes, 0, 0, 0}, {1, 0, 0, 0}};
    return 0;
  }

  /// A copy of the legal queries with NaN (all bits set, in any float type) after each head's last one, so that reading
  /// on is seen.
  void poison(Queries* q) {
    const i64 d = q->head_dim, rows = q->count + 1;
    const i64 row_bytes = d * size_of(q->dtype);
    auto* copy = scratch_.take<std::byte>(q->heads * rows * row_bytes);
    scratch_.device().fill(copy, 0xff, static_cast<std::size_t>(q->heads * rows * row_bytes));
    for (i64 h = 0; h < q->heads; ++h)  // a head's queries lie together
      scratch_.device().copy(copy + h * rows * row_bytes,
                             static_cast<const std::byte*>(q->data) + h * q->head_stride * size_of(q->dtype),
                             static_cast<std::size_t>(q->count * row_bytes));
    q->data = copy;
    q->row_stride = d;
    q->head_stride = rows * d;
    q->seq_stride = q->heads * rows * d;
  }

  /// Eviction's truth: the dense mass that the queries still to come put on each cached token.
  i32 future_mass(Scores* out, sdk::Error* error) {
    const QuerySource& source = self_.setup_.queries;
    const Layer& layer = self_.setup_.layer;
    if (!source.dense_lse) return report(error, "no later queries are known here");
    const i64 begin = span_.end, count = source.tokens - begin;
    float* lse = scratch_.take<float>(layer.num_qo_heads * std::max<i64>(count, 1));
    float* columns = scratch_.take_zero<float>(layer.num_qo_heads * out->stride);
    if (count > 0) {
      for (i32 h = 0; h < layer.num_qo_heads; ++h)
        scratch_.device().copy(lse + h * count, source.dense_lse + h * source.tokens + begin,
                               static_cast<std::size_t>(count) * sizeof(float));
      const Attended later{nullptr, source.span(layer, begin, source.tokens), nullptr, lse};
      if (const i32 code = ops_->read_mass(later, columns, out->stride, error)) return code;
    }
    if (out->rows.per_query_head) {
      scratch_.device().copy(out->value, columns,
                             static_cast<std::size_t>(layer.num_qo_heads * out->stride) * sizeof(float));
      return 0;
    }
    return ops_->group_reduce(columns, out->value, out->units, out->stride, Reduce::sum, error);
  }

  StrategyRuntime& self_;
  KvCache& cache_;
  CallSpan span_;
  Scratch& scratch_;
  Scratch::Frame frame_;  // workspace and poisoned copies are good until the call ends
  Call call_;
  std::unique_ptr<CoreOps> ops_;
  i64 asked_ = 0;  // of the workspace
};

template <class F>
void StrategyRuntime::call(KvCache& cache, const CallSpan& span, F f) {
  Services services(*this, cache, span);
  f(services);
}

StrategyRuntime::StrategyRuntime(const Resolved& resolved, Purpose purpose, const LayerSetup& setup, std::string role)
    : setup_(setup), purpose_(purpose), role_(std::move(role)), instance_(resolved), common_(resolved.common()) {
  if (resolved.base) base_ = std::make_unique<StrategyRuntime>(*resolved.base, purpose, setup, role_ + "-base");
}
StrategyRuntime::~StrategyRuntime() = default;
StrategyRuntime::StrategyRuntime(StrategyRuntime&&) noexcept = default;

Cost StrategyRuntime::cost() const {
  Cost total = cost_;
  if (base_) {
    const Cost b = base_->cost();
    total.bytes += b.bytes;
    total.flops += b.flops;
  }
  return total;
}

void StrategyRuntime::set_queries(const QuerySource& queries) {
  if (base_) base_->set_queries(queries);
  setup_.queries = queries;
  turned_ = true;
}

Culprit StrategyRuntime::culprit(const char* role) const { return {entry().name, role, setup_.layer.index}; }

void StrategyRuntime::check_plan() const {
  constexpr i64 kMost = static_cast<i64>(std::size(Plan{}.sides)), kAny = std::numeric_limits<i64>::max();
  const auto within = [&](const char* what, i64 found, i64 lo, i64 hi) {
    if (found >= lo && found <= hi) return;
    throw lacuna::Error(
        Problem{std::string("strategy '") + entry().name + "' plans an impossible " + what,
                hi == kAny ? "at least " + std::to_string(lo) : std::to_string(lo) + ".." + std::to_string(hi),
                std::to_string(found), "role plan", "fix plan()"});
  };
  within("q_tile", plan_.q_tile, 1, kAny);
  within("unit_tokens", plan_.unit_tokens, 1, kAny);
  within("sinks", plan_.sinks, 0, kAny);
  within("recent", plan_.recent, 0, kAny);
  within("workspace_bytes", plan_.workspace_bytes, 0, kAny);
  within("max_extras", plan_.max_extras, 0, kAny);
  within("num_sides", plan_.num_sides, 0, kMost);
  within("num_states", plan_.num_states, 0, kMost);
}

void StrategyRuntime::prepare(KvCache& cache, const CallSpan& span, i64 budget_tokens) {
  if (base_) base_->prepare(cache, span, -1);
  if (!planned_) {
    plan_ = Plan{};
    plan_.q_tile = 64;
    plan_.unit_tokens = 1;
    plan_.per_query_head = 1;
    plan_.sinks = common_.sinks;
    plan_.recent = common_.recent;
    plan_.max_pieces = plan_.max_tokens = -1;
    plan_.threshold = -1;
    plan_.default_units = -1;
    plan_.max_cached = setup_.max_tokens;
    plan_.budget_tokens = budget_tokens;
    if (base_ && purpose_ == Purpose::evict) plan_.evict_every = base_->plan().evict_every;
    if (entry().plan) call(cache, span, [&](Services& s) { instance_.plan(s, plan_); });
    check_plan();
    if (span.phase == Phase::decode || purpose_ == Purpose::evict) plan_.q_tile = 1;
    if (purpose_ == Purpose::evict && !instance_.has_retain()) plan_.unit_tokens = 1;
    planned_ = true;
    for (i32 i = 0; i < plan_.num_sides; ++i) {
      const std::string name = role_ + "/" + plan_.sides[i].name;
      Side side = plan_.sides[i];
      side.name = name.c_str();
      cache.add_side(side);
    }
  }
}

std::vector<i32> StrategyRuntime::granularities() const {
  std::vector<i32> out = base_ ? base_->granularities() : std::vector<i32>{};
  if (instance_.has_index())
    for (i32 i = 0; i < plan_.num_sides; ++i)
      out.push_back(plan_.sides[i].per == SidePer::token ? 1 : plan_.sides[i].unit_tokens);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

void StrategyRuntime::index(KvCache& cache, const CallSpan& span, const Dirty& dirty) {
  if (base_) base_->index(cache, span, dirty);
  if (!instance_.has_index()) return;
  bool mine = false;
  for (i32 i = 0; i < plan_.num_sides; ++i)
    mine |= (plan_.sides[i].per == SidePer::token ? 1 : plan_.sides[i].unit_tokens) == dirty.unit_tokens;
  if (!mine) return;
  if (indexed_[dirty.unit_tokens]) {
    if (dirty.max_units > 0) call(cache, span, [&](Services& s) { instance_.index(s, dirty); });
    return;
  }
  indexed_[dirty.unit_tokens] = true;
  const Paged kv = cache.view();
  Scratch& scratch = *setup_.scratch;
  const Scratch::Frame frame(scratch);
  i32 *begin = scratch.take_zero<i32>(kv.rows), *end = scratch.take<i32>(kv.rows);
  count_units(scratch.device(), kv.length, kv.rows, dirty.unit_tokens, end);
  const Dirty all{kv.rows, dirty.unit_tokens, begin, end, (kv.max_length + dirty.unit_tokens - 1) / dirty.unit_tokens};
  if (all.max_units > 0) call(cache, span, [&](Services& s) { instance_.index(s, all); });
}

void StrategyRuntime::with_ops(KvCache& cache, const CallSpan& span, const std::function<void(CoreOps&)>& f) {
  const sdk::Call call = facts_of(cache, span);
  f(*ops_for(call));
}

void StrategyRuntime::score(KvCache& cache, const CallSpan& span, Scores& scores) {
  call(cache, span, [&](Services& s) { instance_.score(s, scores); });
}
void StrategyRuntime::mark(KvCache& cache, const CallSpan& span, const Budget& budget, Selection& selection) {
  call(cache, span, [&](Services& s) { instance_.mark(s, budget, selection); });
}
void StrategyRuntime::refine(KvCache& cache, const CallSpan& span, const Budget& budget, Selection& selection) {
  call(cache, span, [&](Services& s) { instance_.refine(s, budget, selection); });
}
void StrategyRuntime::allocate_layers(KvCache& cache, const CallSpan& span, LayerBudget& budget) {
  call(cache, span, [&](Services& s) { instance_.allocate_layers(s, budget); });
}
void StrategyRuntime::allocate_rows(KvCache& cache, const CallSpan& span, const Scores* scores, Budget& budget) {
  call(cache, span, [&](Services& s) { instance_.allocate_rows(s, scores, budget); });
}
void StrategyRuntime::retain(KvCache& cache, const CallSpan& span, const Budget& budget, Kept& kept) {
  call(cache, span, [&](Services& s) { instance_.retain(s, budget, kept); });
}
void StrategyRuntime::attended(KvCache& cache, const CallSpan& span, const Attended& attended) {
  if (base_ && base_->wants_attended()) base_->attended(cache, span, attended);
  if (instance_.has_attended()) call(cache, span, [&](Services& s) { instance_.attended(s, attended); });
}

void StrategyRuntime::calibrate(KvCache& cache, const CallSpan& span, Calibration& calibration) {
  prepare(cache, span, -1);
  call(cache, span, [&](Services& s) { instance_.calibrate(s, calibration); });
}

void StrategyRuntime::rewrite(KvCache& cache, const CallSpan& span, const Rewrite& rewrite) {
  if (base_ && base_->rewrites()) base_->rewrite(cache, span, rewrite);
  if (instance_.has_rewrite()) call(cache, span, [&](Services& s) { instance_.rewrite(s, rewrite); });
}

}  // namespace lacuna
