// One strategy on one layer of the shipped trace, its arrays in the memory of any device, and its roles called in
// order.
#pragma once

#if defined(LACUNA_GPU_TESTS)
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/strategy/instance.hpp"
#include "lacuna/trace/trace.hpp"
#include "staged_ops.hpp"

namespace strategies_test {

using sdk::Phase, sdk::Purpose;

/// What a role gave, on the host.
struct Outcome {
  std::vector<std::vector<float>> scores;         // [rows] over the units that the row's last query sees
  std::vector<std::vector<i32>> pieces, tokens;   // [rows]
  std::vector<std::vector<float>> token_weights;  // [rows], where the plan is weighted
  std::vector<i32> rules;                         // sinks, window and full of a selection; rule and windows of a budget
  std::vector<i64> targets;                       // tokens and pairs of a budget

  bool operator==(const Outcome&) const = default;
};

class Stage final : public sdk::Services {
  template <class T>
  using Array = Buffer<T>;

 public:
  /// Prefill: the first `cached` tokens and all their queries. Decode: the last of them alone. Eviction: after them.
  Stage(const std::shared_ptr<Device>& device, const Resolved& resolved, const Trace& trace, i32 layer, Phase phase,
        Purpose purpose, i64 cached)
      : device_(device),
        instance_(resolved),
        entry_(resolved.type->entry()),
        source_(trace.layer(layer)),
        common_(resolved.common()),
        cached_(cached),
        tokens_(trace.info().tokens()),
        cache_(pool_for(trace.info().layer(layer)), trace.info().num_kv_heads, cached) {
    call_.layer = trace.info().layer(layer);
    call_.phase = phase;
    call_.purpose = purpose;
    call_.step = phase == Phase::decode ? 0 : -1;
    call_.num_seqs = 1;
    call_.gqa = common_.gqa;
    call_.random = {99, static_cast<sdk::u64>(call_.step + 1)};
    call_.on_device = device->on_device();
    call_.stream = device->stream();
    const auto bytes_of = [](const Tensor& t) {
      const auto* begin = static_cast<const std::byte*>(t.data);
      return std::vector<std::byte>(begin, begin + t.elements() * sdk::size_of(t.dtype));
    };
    queries_ = kv_test::upload(bytes_of(source_.q), device);
    const Array<std::byte> k = kv_test::upload(bytes_of(source_.k), device),
                           v = kv_test::upload(bytes_of(source_.v), device);
    cache_.append(k.data(), v.data(), source_.k.dtype, tokens_ * call_.layer.head_dim, cached, 0);
    plan();
  }

  void index() {
    if (!instance_.has_index()) return;
    std::vector<i32> granularities;
    for (i32 i = 0; i < plan_.num_sides; ++i) granularities.push_back(granularity(plan_.sides[i]));
    std::sort(granularities.begin(), granularities.end());
    granularities.erase(std::unique(granularities.begin(), granularities.end()), granularities.end());
    for (const i32 unit_tokens : granularities) {
      const sdk::Dirty dirty = cache_.take_dirty(unit_tokens);
      call([&] { instance_.index(*this, dirty); });
    }
  }

  /// The dense pass over the prompt.
  void attended() {
    if (!instance_.has_attended()) return;
    sdk::Queries q = span(0, cached_);
    const kv_test::HostView host(cache_, -1, *device_);
    HostQueries host_queries(*device_, q);
    std::vector<float> out(static_cast<std::size_t>(q.heads * q.count * q.head_dim)),
        lse(out.size() / static_cast<std::size_t>(q.head_dim));
    attend({call_.layer, host.kv, host_queries.q}, out.data(), lse.data());
    const Array<float> device_out = kv_test::upload(out, device_), device_lse = kv_test::upload(lse, device_);
    call([&] { instance_.attended(*this, {nullptr, q, device_out.data(), device_lse.data()}); });
  }

  Outcome score() {
    return scored([&](sdk::Scores& scores, Device&) { call([&] { instance_.score(*this, scores); }); });
  }

#if defined(LACUNA_GPU_TESTS)
  /// index() and score() once, captured as a CUDA graph that then runs twice on scores of -inf. A strategy that uses
  /// the fused operations cannot: those here stage through the host.
  Outcome index_and_score_in_graph() {
    return scored([&](sdk::Scores& scores, Device& device) {
      const sdk::Dirty dirty = cache_.take_dirty(granularity(plan_.sides[0]));
      call_.kv = cache_.view();
      const auto stream = static_cast<cudaStream_t>(device.stream());
      const std::vector<float> empty = kv_test::download(scores.value, scores.rows.count() * scores.stride, device);
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
      used_ = asked_ = 0;
      instance_.index(*this, dirty);
      used_ = asked_ = 0;
      instance_.score(*this, scores);
      REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
      REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
      for (int replay = 0; replay < 2; ++replay) {
        device.copy_in(scores.value, empty.data(), empty.size() * sizeof(float));
        REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
      }
      device.synchronize();
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    });
  }
#endif

  Outcome allocate() {
    const sdk::Rows r = rows(false);
    const i64 units = cached_;
    std::vector<float> random;
    for (i64 i = 0; i < r.count() * units; ++i) {
      const float u = sdk::Random{7, 0}.uniform(static_cast<sdk::u64>(i / units), static_cast<sdk::u64>(i % units));
      random.push_back(u * static_cast<float>(1 + i / units));
    }
    const Array<float> value = kv_test::upload(random, device_);
    const sdk::Scores scores{r, value.data(), units, static_cast<i32>(units), 1, cached_ / 4};
    DeviceBudget budget(*this, r);
    call([&] { instance_.allocate_rows(*this, &scores, budget.view); });
    Outcome out;
    out.targets = kv_test::download(budget.longs.data(), budget.longs.size(), *device_);
    out.rules = kv_test::download(budget.ints.data(), budget.ints.size(), *device_);
    return out;
  }

  Outcome mark() {
    const sdk::Rows r = rows(plan_.per_query_head != 0);
    DeviceBudget budget(*this, r);
    DeviceSelection set(*this, r);
    call([&] { instance_.mark(*this, budget.view, set.view); });
    return set.outcome();
  }

  /// Refines a choice of every third token or so.
  Outcome refine() {
    const sdk::Rows r = rows(true);
    DeviceBudget budget(*this, r);
    DeviceSelection set(*this, r);
    std::vector<i32> counts, tokens(static_cast<std::size_t>(r.count() * set.view.token_capacity));
    for (i64 row = 0; row < r.count(); ++row) {
      i32 n = 0;
      for (i32 slot = 0; slot < cached_; ++slot) {
        if ((slot * 7 + row) % 20 < 7) tokens[static_cast<std::size_t>(row * set.view.token_capacity + n++)] = slot;
      }
      counts.push_back(n);
    }
    device_->copy_in(set.view.token_count, counts.data(), counts.size() * sizeof(i32));
    device_->copy_in(set.view.tokens, tokens.data(), tokens.size() * sizeof(i32));
    call([&] { instance_.refine(*this, budget.view, set.view); });
    return set.outcome();
  }

  Outcome retain() {
    const sdk::Rows r = rows(false);
    DeviceBudget budget(*this, r);
    DeviceSelection set(*this, r);
    sdk::Kept kept{set.view};
    call([&] { instance_.retain(*this, budget.view, kept); });
    return set.outcome();
  }

  const sdk::Call& call() const noexcept override { return call_; }
  sdk::Ops& ops() noexcept override { return *ops_; }
  i32 array(sdk::ArrayKind kind, const char* name, i64 bytes, sdk::Array* out, sdk::Error* error) noexcept override {
    if (kind == sdk::ArrayKind::side) {
      *out = cache_.side(name);
      return 0;
    }
    if (kind == sdk::ArrayKind::state) {
      for (i32 i = 0; i < plan_.num_states; ++i) {
        const sdk::State& s = plan_.states[i];
        if (name != std::string(s.name)) continue;
        *out = {states_.at(name).data(), s.dtype, 2, {1, s.elements, 0, 0}, {s.elements, 1, 0, 0}};
        return 0;
      }
      return fail(error, "no such state");
    }
    const i64 size = (bytes + 255) / 256 * 256;
    if (asked_ + bytes > plan_.workspace_bytes) return fail(error, "the workspace is too small");
    asked_ += bytes;
    *out = {workspace_.data() + used_, sdk::Dtype::u8, 1, {bytes, 0, 0, 0}, {1, 0, 0, 0}};
    device_->fill(out->data, 0, static_cast<std::size_t>(size));
    used_ += size;
    return 0;
  }
  i32 queries(sdk::Span which, i64 n, sdk::Queries* out, sdk::Error*) noexcept override {
    const i64 begin = which == sdk::Span::seen   ? 0
                      : which == sdk::Span::last ? std::max<i64>(0, cached_ - n)
                                                 : first_query();
    *out = span(begin, cached_);
    return 0;
  }
  /// Not the truth: any scores show whether what is made of them is.
  i32 oracle_mass(sdk::Scores* out, sdk::Error*) noexcept override {
    std::vector<float> value(static_cast<std::size_t>(out->rows.count() * out->stride));
    for (std::size_t i = 0; i < value.size(); ++i) value[i] = 1.f / static_cast<float>(1 + i % 1009);
    device_->copy_in(out->value, value.data(), value.size() * sizeof(float));
    return 0;
  }
  i32 base_scores(sdk::Scores*, sdk::Error* error) noexcept override { return fail(error, "no base here"); }
  void charge(double, double) noexcept override {}

 private:
  /// A quarter of what each row sees.
  struct DeviceBudget {
    DeviceBudget(Stage& stage, const sdk::Rows& rows) {
      const i64 n = rows.count();
      std::vector<i64> host(static_cast<std::size_t>(2 * n));
      for (i64 row = 0; row < n; ++row) {
        const i64 end = stage.visible(rows, row), begin = end - stage.queries_of(rows, row),
                  tokens = std::max<i64>(end / 4, 1);
        host[static_cast<std::size_t>(row)] = tokens;
        for (i64 q = begin; q < end; ++q) host[static_cast<std::size_t>(n + row)] += std::min(tokens, q + 1);
      }
      longs = kv_test::upload(host, stage.device_);
      ints = kv_test::upload(std::vector<i32>(static_cast<std::size_t>(3 * n)), stage.device_);
      view = {rows,
              longs.data(),
              longs.data() + n,
              ints.data(),
              ints.data() + n,
              ints.data() + 2 * n,
              stage.entry_.takes_budget,
              stage.plan_.sinks,
              stage.plan_.recent,
              /*density=*/.25,
              /*mean_tokens=*/-1};
    }
    Array<i64> longs;
    Array<i32> ints;
    sdk::Budget view;
  };

  struct DeviceSelection {
    DeviceSelection(Stage& stage, const sdk::Rows& rows) : device(*stage.device_), weighted(stage.plan_.weighted) {
      const sdk::Plan& plan = stage.plan_;
      if (plan.max_extras > 0) throw Error({"extra tokens cannot be had here", "", "", "", ""});
      const i64 n = rows.count(), most_pieces = plan.unit_tokens > 1 ? stage.cached_ / plan.unit_tokens + 1 : 0;
      const i64 p = plan.max_pieces >= 0 ? plan.max_pieces : most_pieces,
                t = plan.max_tokens >= 0 ? plan.max_tokens : stage.cached_;
      ints = kv_test::upload(std::vector<i32>(static_cast<std::size_t>(n * (p + t + 5))), stage.device_);
      weights = kv_test::upload(std::vector<float>(static_cast<std::size_t>(n * (p + t))), stage.device_);
      i32* next = ints.data();
      const auto take = [&next](i64 count) { return std::exchange(next, next + count); };
      view.rows = rows;
      view.kv_block = plan.unit_tokens > 1 ? plan.unit_tokens : 0;
      view.piece_capacity = static_cast<i32>(p);
      view.token_capacity = static_cast<i32>(t);
      view.piece_count = take(n);
      view.token_count = take(n);
      view.exact_sinks = take(n);
      view.exact_window = take(n);
      view.full = take(n);
      view.pieces = take(n * p);
      view.tokens = take(n * t);
      if (weighted) {
        view.piece_log_weight = weights.data();
        view.token_log_weight = weights.data() + n * p;
      }
    }
    Outcome outcome() const {
      Outcome out;
      const i64 n = view.rows.count();
      const auto lists = [&](const auto* data, const i32* count, i64 capacity, auto& rows) {
        const auto all = kv_test::download(data, n * capacity, device);
        const auto sizes = kv_test::download(count, n, device);
        for (i64 row = 0; row < n; ++row) {
          const auto begin = all.begin() + row * capacity;
          rows.emplace_back(begin, begin + sizes[static_cast<std::size_t>(row)]);
        }
      };
      lists(view.pieces, view.piece_count, view.piece_capacity, out.pieces);
      lists(view.tokens, view.token_count, view.token_capacity, out.tokens);
      if (weighted) lists(view.token_log_weight, view.token_count, view.token_capacity, out.token_weights);
      out.rules = kv_test::download(view.exact_sinks, 3 * n, device);
      return out;
    }
    Device& device;
    bool weighted;
    Array<i32> ints;
    Array<float> weights;
    sdk::Selection view{};
  };

  std::shared_ptr<PagePool> pool_for(const sdk::Layer& layer) const {
    const i64 pages = layer.num_kv_heads * ((cached_ + 15) / 16);
    return std::make_shared<PagePool>(device_, 16, layer.head_dim, source_.k.dtype, pages, true);
  }

  void plan() {
    plan_.q_tile = 64;
    plan_.unit_tokens = 1;
    plan_.per_query_head = 1;
    plan_.sinks = common_.sinks;
    plan_.recent = common_.recent;
    plan_.max_pieces = plan_.max_tokens = -1;
    plan_.threshold = -1;
    plan_.default_units = -1;
    plan_.max_cached = cached_;
    plan_.budget_tokens = -1;
    if (entry_.plan) call([&] { instance_.plan(*this, plan_); });
    if (call_.phase == Phase::decode || call_.purpose == Purpose::evict) plan_.q_tile = 1;
    if (call_.purpose == Purpose::evict) plan_.unit_tokens = 1;
    workspace_ = Array<std::byte>(device_, plan_.workspace_bytes + 64 * 256);  // alignment is not the strategy's
    for (i32 i = 0; i < plan_.num_sides; ++i) cache_.add_side(plan_.sides[i]);
    for (i32 i = 0; i < plan_.num_states; ++i) {
      const sdk::State& s = plan_.states[i];
      states_[s.name] = kv_test::upload(
          std::vector<std::byte>(static_cast<std::size_t>(s.elements * sdk::size_of(s.dtype))), device_);
    }
  }

  /// What `role` makes of scores that are -inf everywhere.
  template <class F>
  Outcome scored(F role) {
    const sdk::Rows r = rows(plan_.per_query_head != 0);
    const i64 units = (cached_ + plan_.unit_tokens - 1) / plan_.unit_tokens, stride = units + 3;
    const std::vector<float> empty(static_cast<std::size_t>(r.count() * stride),
                                   -std::numeric_limits<float>::infinity());
    const Array<float> value = kv_test::upload(empty, device_);
    sdk::Scores scores{r, value.data(), stride, static_cast<i32>(units), plan_.unit_tokens, cached_ / 4};
    role(scores, *device_);
    const std::vector<float> host = kv_test::download(value.data(), value.size(), *device_);
    Outcome out;
    for (i64 row = 0; row < r.count(); ++row) {
      const auto begin = host.begin() + row * stride;
      out.scores.emplace_back(begin, begin + (visible(r, row) + plan_.unit_tokens - 1) / plan_.unit_tokens);
    }
    return out;
  }

  template <class F>
  void call(F role) {
    used_ = asked_ = 0;
    call_.kv = cache_.view();
    ops_ = std::make_unique<StagedOps>(*device_, call_, cache_);
    role();
    device_->synchronize();
  }

  i64 first_query() const { return call_.phase == Phase::decode ? cached_ - 1 : 0; }
  sdk::Rows rows(bool per_query_head) const {
    const i64 queries = cached_ - first_query();
    const i32 tiles =
        call_.purpose == Purpose::evict ? 1 : static_cast<i32>((queries + plan_.q_tile - 1) / plan_.q_tile);
    return {1,
            per_query_head ? call_.layer.num_qo_heads : call_.layer.num_kv_heads,
            0,
            tiles,
            plan_.q_tile,
            per_query_head,
            queries,
            first_query()};
  }
  i64 queries_of(const sdk::Rows& r, i64 row) const {
    return call_.purpose == Purpose::evict ? 1 : r.query_end(row) - r.query_begin(row);
  }
  i64 visible(const sdk::Rows& r, i64 row) const {
    return call_.purpose == Purpose::evict ? cached_ : first_query() + r.query_end(row);
  }
  sdk::Queries span(i64 begin, i64 end) const {
    const sdk::Layer& l = call_.layer;
    const i64 head = tokens_ * l.head_dim;
    return {queries_.data() + begin * l.head_dim * sdk::size_of(source_.q.dtype),
            source_.q.dtype,
            1,
            l.num_qo_heads,
            l.head_dim,
            end - begin,
            begin,
            head * l.num_qo_heads,
            head,
            l.head_dim};
  }
  static i32 granularity(const sdk::Side& s) { return s.per == sdk::SidePer::token ? 1 : s.unit_tokens; }
  static i32 fail(sdk::Error* error, const char* text) {
    error->code = 1;
    std::snprintf(error->text, sizeof error->text, "%s", text);
    return 1;
  }

  std::shared_ptr<Device> device_;
  Instance instance_;
  const sdk::Entry& entry_;
  LayerTensors source_;
  sdk::Common common_;
  i64 cached_, tokens_;
  KvCache cache_;
  sdk::Call call_{};
  sdk::Plan plan_{};
  Array<std::byte> queries_, workspace_;
  std::map<std::string, Array<std::byte>> states_;
  std::unique_ptr<StagedOps> ops_;
  i64 used_ = 0, asked_ = 0;  // of the workspace: with alignment, and by the strategy
};

}  // namespace strategies_test
