#include "lacuna/pipeline/evict.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "pipeline/row_kernels.hpp"
#include "pipeline/selections.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr float kNone = -std::numeric_limits<float>::infinity();

std::vector<i32> everything(i32 length) {
  std::vector<i32> all(static_cast<std::size_t>(length));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

/// The first `sinks` and last `recent` of `length` slots.
std::vector<i32> ends(i32 length, i32 sinks, i32 recent) {
  std::vector<i32> out;
  for (i32 i = 0; i < length; ++i)
    if (i < sinks || i >= length - recent) out.push_back(i);
  return out;
}

/// The k best, ties to the lower slot, -inf never; ascending.
std::vector<i32> top_slots(const std::vector<float>& value, i64 k) {
  std::vector<i32> order;
  for (std::size_t i = 0; i < value.size(); ++i)
    if (value[i] > kNone) order.push_back(static_cast<i32>(i));
  const auto n = static_cast<std::size_t>(std::clamp<i64>(k, 0, static_cast<i64>(order.size())));
  if (n < order.size())
    std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(), [&](i32 a, i32 b) {
      const float x = value[static_cast<std::size_t>(a)], y = value[static_cast<std::size_t>(b)];
      return x > y || (x == y && a < b);
    });
  order.resize(n);
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<i32> keep_best(const float* value, i32 length, i64 tokens, i32 sinks, i32 recent) {
  std::vector<i32> kept = ends(length, sinks, recent);
  std::vector<float> candidate(value, value + length);
  for (const i32 i : kept) candidate[static_cast<std::size_t>(i)] = kNone;
  const std::vector<i32> best =
      top_slots(candidate, std::max<i64>(tokens - static_cast<i64>(kept.size()), kept.empty() ? 1 : 0));
  kept.insert(kept.end(), best.begin(), best.end());
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// What an explicit strategy keeps of a target: 0 for those tokens.
void score_retained(StrategyRuntime& strategy, KvCache& cache, Scratch& scratch, const CallSpan& span, Scores& out) {
  const std::vector<i64> tokens(static_cast<std::size_t>(out.rows.count()), std::max<i64>(out.budget_tokens, 0));
  Budget budget = make_budget(scratch, out.rows);
  budget.limited = out.budget_tokens >= 0;
  budget.mean_tokens = out.budget_tokens;
  budget.sinks = strategy.plan().sinks;
  budget.recent = strategy.plan().recent;
  for (i64* to : {budget.tokens, budget.pairs})
    scratch.device().copy_in(to, tokens.data(), tokens.size() * sizeof(i64));
  const i64 slots = cache.view().max_length;
  Kept kept{make_selection(scratch, out.rows, 0, 0, slots, false)};
  strategy.retain(cache, span, budget, kept);
  const float* kept_score = scratch.take_zero<float>(out.rows.count() * slots);
  scatter_floats(scratch.device(), out.rows.count(), kept.set.token_count, kept_score, slots, kept.set.tokens,
                 kept.set.token_capacity, out.value, out.stride);
}

}  // namespace

void rank_scores(StrategyRuntime& strategy, KvCache& cache, const LayerSetup& setup, const CallSpan& span,
                 Scores& out) {
  Scratch& scratch = *setup.scratch;
  const Scratch::Frame frame(scratch);
  const Plan& plan = strategy.plan();
  const i32 heads = setup.layer.num_kv_heads;
  const auto refuse = [&](const char* expected, const char* found) {
    throw lacuna::Error(
        Problem{std::string("strategy '") + strategy.entry().name + "' does not rank as its wrapper does", expected,
                found, "the base of an evict role", "choose another gqa, or another base"});
  };
  if (!out.rows.per_query_head && strategy.gqa() == Gqa::union_ && plan.per_query_head)
    refuse("one score per KV head: gqa = mean, max or sum", "gqa = union");
  const i64 values = out.rows.count() * out.stride;
  fill_floats(scratch.device(), out.value, kNone, values);
  if (!strategy.instance().has_score()) {
    if (out.rows.per_query_head) refuse("scores of query heads", "a strategy that chooses for KV heads");
    if (!strategy.entry().takes_budget && !strategy.resolved().type->always_dense())
      refuse("a base that takes a budget", "one with a size of its own");
    score_retained(strategy, cache, scratch, span, out);
    return;
  }
  if (out.rows.per_query_head && !plan.per_query_head) refuse("scores of query heads", "scores of KV heads");
  Scores scores = out;
  scores.rows.per_query_head = plan.per_query_head;
  scores.rows.heads = plan.per_query_head ? setup.layer.num_qo_heads : heads;
  scores = ask_scores(strategy, cache, span, scratch, scores, out.rows, setup.check, static_cast<double>(out.units));
  lift_ends(scratch.device(), cache.view().length, out.rows, heads, plan.sinks, plan.recent, scores.value, out.stride);
  scratch.device().copy(out.value, scores.value, static_cast<std::size_t>(values) * sizeof(float));
}

void rank_subset(StrategyRuntime& strategy, const KvCache& cache, const LayerSetup& setup, const CallSpan& span,
                 const Subset& subset, Scores& out) {
  if (strategy.wants_attended())
    throw lacuna::Error(Problem{std::string("strategy '") + strategy.entry().name + "' scores by what all queries read",
                                "a base that scores cached tokens by themselves", "one that looks at all attention",
                                "the base of an evict role", "choose another base"});
  Scratch& scratch = *setup.scratch;
  const Scratch::Frame frame(scratch);
  const i32 heads = setup.layer.num_kv_heads;
  const std::vector<i32> count = scratch.read(subset.count, heads);
  const std::vector<i32> slots = scratch.read(subset.slots, heads * subset.stride);
  std::vector<std::vector<i32>> held;
  for (i64 h = 0; h < heads; ++h) {
    const i64 n = count[static_cast<std::size_t>(h)];
    if (n < 1 || n > subset.stride)
      throw lacuna::Error(Problem{"a bad subset of the cache to be scored",
                                  "1.." + std::to_string(subset.stride) + " tokens of each KV head", std::to_string(n),
                                  "KV head " + std::to_string(h), "fix the wrapper"});
    held.emplace_back(slots.begin() + h * subset.stride, slots.begin() + h * subset.stride + n);
  }
  KvCache part = cache.fork();
  part.retain(held);
  CallSpan until = span;
  until.end = std::min(span.end, std::max<i64>(subset.now, 1));
  until.begin = std::min(span.begin, until.end - 1);
  for (const i32 unit_tokens : strategy.granularities()) strategy.index(part, until, part.take_dirty(unit_tokens));

  Scores scores = out;
  scores.stride = part.view().max_length;
  scores.units = static_cast<i32>(scores.stride);
  scores.rows.first_position = until.begin;
  scores.rows.num_queries = until.end - until.begin;
  scores.rows.q_tile = static_cast<i32>(scores.rows.num_queries);
  scores.value = scratch.take<float>(scores.rows.count() * scores.stride);
  rank_scores(strategy, part, setup, until, scores);
  fill_floats(scratch.device(), out.value, kNone, out.rows.count() * out.stride);
  scatter_floats(scratch.device(), out.rows.count(), subset.count, scores.value, scores.stride, subset.slots,
                 subset.stride, out.value, out.stride);
}

Eviction decide_eviction(StrategyRuntime* strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
                         const CallSpan& span, i64 capacity, const ChooseOptions& options) {
  const Layer& layer = setup.layer;
  const Paged kv = cache.view();
  const i32 heads = layer.num_kv_heads;
  Scratch& scratch = *setup.scratch;
  const Scratch::Frame frame(scratch);
  std::vector<i32> length;
  for (i32 h = 0; h < heads; ++h) length.push_back(static_cast<i32>(cache.length(h)));
  Eviction out;
  const BudgetSpec none;
  const BudgetSpec& budget_spec = strategy ? strategy->resolved().budget : none;
  const Plan empty_plan{};
  const Plan& plan = strategy ? strategy->plan() : empty_plan;
  const i64 cached = kv.max_length;
  out.unit_tokens = plan.unit_tokens;
  out.limited = budget_spec.kind != BudgetSpec::Kind::none;
  if (budget_spec.kind == BudgetSpec::Kind::mass)
    throw lacuna::Error(Problem{"an eviction cannot be given by mass", "density, tokens or units", "mass",
                                "the evict role", "change the budget"});
  if (strategy && !out.limited && strategy->entry().takes_budget &&
      !(allocator && allocator->instance().has_allocate_rows()))
    throw lacuna::Error(Problem{std::string("strategy '") + strategy->entry().name + "' needs a budget",
                                "density, tokens or units", "none", "the evict role",
                                "give the role density = ..., or the scenario a [budget]"});
  if (!strategy && allocator && allocator->entry().takes_budget)
    throw lacuna::Error(Problem{std::string("allocator '") + allocator->entry().name + "' has nothing to share out",
                                "an evict strategy with a budget beside it", "none", "the evict role",
                                "add evict = {name = ...}"});
  out.mean_tokens = capacity >= 0 ? capacity : std::min(cached, target_rule(budget_spec, -1, 1).tokens(cached));
  out.target_tokens = out.mean_tokens;
  out.allocated_mean = static_cast<double>(out.mean_tokens);
  if (allocator && allocator->instance().has_allocate_layers() && out.limited && capacity < 0) {
    std::vector<double> tokens(static_cast<std::size_t>(layer.num_layers), static_cast<double>(out.mean_tokens));
    LayerBudget layers{layer.num_layers, out.mean_tokens, cached, std::max(plan.sinks, 0) + std::max(plan.recent, 0),
                       tokens.data(),    setup.entropy};
    allocator->allocate_layers(cache, span, layers);
    for (const double t : tokens)
      if (!(t >= 0))
        throw lacuna::Error(
            Problem{std::string("allocator '") + allocator->entry().name + "' gave a layer an impossible target",
                    "a number of at least 0", std::to_string(t), "role allocate_layers", "fix allocate_layers()"});
    out.allocated_mean = std::accumulate(tokens.begin(), tokens.end(), 0.0) / static_cast<double>(tokens.size());
    out.target_tokens = std::min(cached, round_half_up(tokens[static_cast<std::size_t>(layer.index)]));
  }

  const bool per_query_head = strategy && plan.per_query_head != 0;
  const bool unite = strategy && strategy->gqa() == Gqa::union_;
  const bool ranked_per_head = per_query_head && unite;
  const i64 queries = span.end - span.begin;  // one tile holds them all
  const Rows scored{
      1,         per_query_head ? layer.num_qo_heads : heads, 0, 1, static_cast<i32>(queries), per_query_head, queries,
      span.begin};
  Rows rows = scored;
  if (!ranked_per_head) rows.heads = heads, rows.per_query_head = 0;

  Scores scores{rows, nullptr, cached, static_cast<i32>(cached), 1, out.limited ? out.target_tokens : -1};
  const bool explicit_retain = strategy && strategy->instance().has_retain();
  const bool shared_out = allocator && allocator->instance().has_allocate_rows();
  std::vector<float> values;  // of `scores`, on the host
  if (strategy && strategy->instance().has_score() && !(explicit_retain && !allocator)) {
    scores.rows = scored;
    scores = ask_scores(*strategy, cache, span, scratch, scores, rows, options.check, static_cast<double>(cached));
    if (shared_out && !strategy->comparable_across_heads()) {
      std::vector<i32> count;
      for (i64 r = 0; r < rows.count(); ++r) count.push_back(length[static_cast<std::size_t>(rows.kv_row(r, heads))]);
      const i32* counts = scratch.take_copy(count.data(), rows.count());
      strategy->with_ops(cache, span, [&](CoreOps& ops) {
        ops.rank_normalise(scores.value, static_cast<i32>(rows.count()), cached, counts);
      });
      out.rank_normalised = true;
    }
    values = scratch.read(scores.value, rows.count() * cached);
    if (options.keep_scores) out.scores = values, out.scores_rows = rows.count();
  }

  // An allocator shares out the whole target, also what a head that is shorter by now leaves of its own.
  const i64 n = rows.count();
  std::vector<i64> tokens;
  for (i64 r = 0; r < n; ++r)
    tokens.push_back(shared_out
                         ? out.target_tokens
                         : std::min<i64>(out.target_tokens, length[static_cast<std::size_t>(rows.kv_row(r, heads))]));
  Budget budget = make_budget(scratch, rows);
  budget.limited = out.limited;
  budget.mean_tokens = scores.budget_tokens;
  budget.density = budget_spec.kind == BudgetSpec::Kind::density ? budget_spec.value : 0;
  budget.sinks = plan.sinks;
  budget.recent = plan.recent;
  for (i64* to : {budget.tokens, budget.pairs})
    scratch.device().copy_in(to, tokens.data(), tokens.size() * sizeof(i64));
  if (shared_out) {
    const i64 total = std::accumulate(tokens.begin(), tokens.end(), i64{0});
    allocator->allocate_rows(cache, span, scores.value ? &scores : nullptr, budget);
    if (options.check) check_budget(allocator->culprit("allocate_rows"), HostBudget(scratch, budget).view(), total);
    scratch.device().copy(budget.tokens, budget.pairs, tokens.size() * sizeof(i64));
  }
  const HostBudget decided(scratch, budget);
  const Budget& target = decided.view();

  out.kept.resize(static_cast<std::size_t>(heads));
  if (explicit_retain && !scores.value) {
    Kept kept{make_selection(scratch, rows, 0, 0, cached, false)};
    strategy->retain(cache, span, budget, kept);
    const HostSelection host(scratch, kept.set);
    if (options.check) host.check_guards(strategy->culprit("retain"));
    kept.set = host.view();
    if (options.check) check_kept(strategy->culprit("retain"), kept, length.data());
    for (i64 r = 0; r < rows.count(); ++r) {
      auto& list = out.kept[static_cast<std::size_t>(rows.kv_row(r, heads))];
      const i32* t = kept.set.tokens + r * kept.set.token_capacity;
      list.insert(list.end(), t, t + kept.set.token_count[r]);
    }
  } else {
    for (i64 r = 0; r < rows.count(); ++r) {
      const i64 head = rows.kv_row(r, heads);
      const i32 cached_here = length[static_cast<std::size_t>(head)];
      auto& list = out.kept[static_cast<std::size_t>(head)];
      const i64 wanted = target.tokens[r];
      const Rule rule = static_cast<Rule>(target.rule[r]);
      std::vector<i32> kept;
      if (rule == Rule::full || (rule == Rule::ranked && (!target.limited || wanted >= cached_here)))
        kept = everything(cached_here);
      else if (rule == Rule::window)
        kept = ends(cached_here, target.window_sinks[r], target.window_recent[r]);
      else if (rule == Rule::none)
        kept = ends(cached_here, plan.sinks, plan.recent);
      else if (!scores.value)
        throw lacuna::Error(Problem{std::string("allocator '") + (allocator ? allocator->entry().name : "?") +
                                        "' leaves a head to be ranked, and nothing ranks it",
                                    "an evict strategy beside it", "none", "the cell's evict role",
                                    "add evict = {name = ...}"});
      else {
        const float* const row = values.data() + r * cached;
        out.floor |= static_cast<i64>(ends(cached_here, plan.sinks, plan.recent).size()) > wanted ||
                     std::count(row, row + cached_here, -kNone) > wanted;
        kept = keep_best(values.data() + r * cached, cached_here, wanted, plan.sinks, plan.recent);
      }
      list.insert(list.end(), kept.begin(), kept.end());
    }
  }
  for (std::size_t h = 0; h < out.kept.size(); ++h) {
    auto& list = out.kept[h];
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    out.kept_tokens += static_cast<double>(list.size());
    out.cached_tokens += length[h];
  }
  return out;
}

}  // namespace lacuna
