#include "lacuna/pipeline/select.hpp"

#include <algorithm>
#include <limits>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "pipeline/account.hpp"
#include "pipeline/row_kernels.hpp"
#include "pipeline/selections.hpp"

namespace lacuna {
using namespace sdk;

namespace {

std::vector<i32> lengths_of(const KvCache& cache, i32 heads) {
  std::vector<i32> out;
  for (i32 h = 0; h < heads; ++h) out.push_back(static_cast<i32>(cache.length(h)));
  return out;
}

/// One call of choose(): what its rows share, and the steps over a range of tiles.
class Chooser {
 public:
  Chooser(StrategyRuntime& strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
          const CallSpan& span, const ChooseOptions& options)
      : strategy_(strategy),
        allocator_(allocator && allocator->instance().has_allocate_rows() ? allocator : nullptr),
        cache_(cache),
        layer_(setup.layer),
        setup_(setup),
        scratch_(*setup.scratch),
        device_(scratch_.device()),
        span_(span),
        options_(options),
        kv_(cache.view()),
        length_(lengths_of(cache, layer_.num_kv_heads)) {
    const Plan& plan = strategy.plan();
    const BudgetSpec& budget = strategy.resolved().budget;
    rule_.target = target_rule(budget, span.phase == Phase::prefill ? span.end : -1, plan.unit_tokens);
    rule_.unit_tokens = plan.unit_tokens;
    rule_.sinks = plan.sinks;
    rule_.recent = plan.recent;
    rule_.first_units = plan.first_units;
    rule_.last_units = plan.last_units;
    rule_.min_units = plan.min_units;
    rule_.default_units = plan.default_units;
    rule_.num_kv_heads = layer_.num_kv_heads;
    if (budget.kind == BudgetSpec::Kind::mass)
      rule_.top_p = budget.value;
    else if (!rule_.target.limited() && plan.score_kind == ScoreKind::mass)
      rule_.top_p = plan.threshold;
    if (instance().has_refine()) {
      ChooseOptions of_base = options;  // what is reported is the wrapper's
      of_base.account = of_base.keep_lists = of_base.keep_scores = false;
      base_ = std::make_unique<Chooser>(*strategy.base(), nullptr, cache, setup, span, of_base);
      q_tile_ = base_->q_tile_;
    } else {
      q_tile_ = plan.q_tile;
    }
    check_combination();
  }

  i32 tiles() const { return static_cast<i32>((span_.end - span_.begin + q_tile_ - 1) / q_tile_); }

  /// Tiles whose scores and lists fit the room for them.
  i32 tiles_at_once() const {
    // What a range decides together must not depend on how much memory happens to be free.
    constexpr i64 kFixed = i64{16} << 20;
    const i64 room =
        allocator_ || strategy_.wants_attended() ? std::min(options_.range_elements, kFixed) : options_.range_elements;
    return static_cast<i32>(std::clamp<i64>(room / std::max<i64>(elements_per_tile(), 1), 1, tiles()));
  }

  /// What the rows of the result are, once all of it is chosen.
  Rows result_rows() const { return rows(!reads_by_group(), 0, tiles()); }
  i32 kv_block() const { return !instance().has_refine() && plan().unit_tokens > 1 ? plan().unit_tokens : 0; }
  bool weighted() const { return strategy_.weighs(); }

  Selection choose_range(i32 begin, i32 count, Choice& out) {
    Selection chosen = instance().has_refine() ? refine(begin, count, out)
                       : instance().has_mark() ? mark(begin, count, out)
                                               : rank(begin, count, out);
    if (chosen.rows.per_query_head && strategy_.gqa() == Gqa::union_)
      strategy_.with_ops(cache_, span_,
                         [&](CoreOps& ops) { chosen = unite_groups(scratch_, ops, kv_, chosen, layer_.num_kv_heads); });
    return chosen;
  }

  const std::vector<i32>& length() const { return length_; }

 private:
  const Plan& plan() const { return strategy_.plan(); }
  const Instance& instance() const { return strategy_.instance(); }
  bool ranks() const { return !instance().has_refine() && !instance().has_mark(); }

  /// Rows are KV heads once the scores are reduced.
  bool reduced() const {
    const Gqa g = strategy_.gqa();
    return !plan().per_query_head || g == Gqa::mean || g == Gqa::max || g == Gqa::sum;
  }
  bool reads_by_group() const {
    if (strategy_.gqa() == Gqa::union_) return true;
    return instance().has_refine() ? false : instance().has_mark() ? !plan().per_query_head : reduced();
  }
  i64 units() const { return (kv_.max_length + plan().unit_tokens - 1) / plan().unit_tokens; }
  i64 piece_capacity() const {
    return plan().max_pieces >= 0   ? plan().max_pieces
           : plan().unit_tokens > 1 ? kv_.max_length / plan().unit_tokens + 1
                                    : 0;
  }
  i64 token_capacity() const { return plan().max_tokens >= 0 ? plan().max_tokens : kv_.max_length; }

  i64 elements_per_tile() const {
    const i64 heads = layer_.num_qo_heads;
    // A union goes through a flag for every slot.
    const i64 flags = strategy_.gqa() == Gqa::union_ ? static_cast<i64>(layer_.num_kv_heads) * kv_.max_length : 0;
    return std::max(flags, elements_without_union(heads));
  }
  i64 elements_without_union(i64 heads) const {
    if (instance().has_refine()) return heads * kv_.max_length + base_->elements_per_tile();
    if (instance().has_mark())
      return (plan().per_query_head ? heads : layer_.num_kv_heads) * (piece_capacity() + token_capacity());
    return (plan().per_query_head ? heads : layer_.num_kv_heads) * units();
  }

  Rows rows(bool per_query_head, i32 tile_begin, i32 count) const {
    return {1,
            per_query_head ? layer_.num_qo_heads : layer_.num_kv_heads,
            tile_begin,
            count,
            q_tile_,
            per_query_head,
            span_.end - span_.begin,
            span_.begin};
  }

  [[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& found,
                           const std::string& remedy = "") const {
    throw lacuna::Error(Problem{std::string("strategy '") + strategy_.entry().name + "' " + what, expected, found,
                                "the select role", remedy});
  }

  void check_combination() const {
    const bool by_mass = strategy_.resolved().budget.kind == BudgetSpec::Kind::mass;
    if (ranks()) {
      if (!rule_.target.limited() && rule_.top_p < 0 && plan().default_units < 0 && !allocator_)
        refuse("needs a budget", "density, tokens, units or mass", "none",
               "give the role density = ..., or the scenario a [budget]");
      if (by_mass && plan().score_kind != ScoreKind::mass)
        refuse("cannot be cut by mass", "scores of kind mass", "scores that only rank",
               "give density, tokens or units instead");
      return;
    }
    const Gqa g = strategy_.gqa();
    if (by_mass) refuse("cannot be cut by mass", "density, tokens or units", "mass");
    if (plan().per_query_head && g != Gqa::none && g != Gqa::union_)
      refuse("chooses for each query head by itself, so that a group has nothing to reduce", "gqa = none or union",
             "mean, max or sum");
    if (plan().weighted && g == Gqa::union_)
      refuse("weights what it reads for each query head, which a union would lose", "gqa = none", "union");
    if (strategy_.adds_extras() && g == Gqa::union_)
      refuse("reads extra tokens for each query head, which a union would lose", "gqa = none", "union");
    if (base_ && base_->strategy_.adds_extras())
      refuse("reads the cached tokens of its base alone, and its base adds others", "a base without extra tokens",
             base_->strategy_.entry().name);
    if (base_ && base_->plan().weighted && !plan().weighted)
      refuse("keeps no log weights, and its base samples with them", "a base without log weights",
             base_->strategy_.entry().name);
  }

  Budget targets(const Rows& of) {
    Budget b = make_budget(scratch_, of);
    b.limited = rule_.target.limited();
    b.density = rule_.target.kind == BudgetSpec::Kind::density ? rule_.target.value : 0;
    b.sinks = plan().sinks;
    b.recent = plan().recent;
    set_targets(device_, kv_.length, rule_, b);
    return b;
  }

  /// What the budget's rows asked for, where one was given.
  void account(Choice& out, const Budget& b, i32 unit_tokens) {
    if (!options_.account || !b.limited) return;
    const HostBudget host(scratch_, b);
    account_targets(out, layer_, host.view(), unit_tokens);
  }

  /// Slots that each row's last query sees, for the contract.
  std::vector<i64> visible(const Rows& of) const {
    std::vector<i64> out;
    for (i64 r = 0; r < of.count(); ++r) out.push_back(row_slots(length_.data(), of, r, layer_.num_kv_heads).end);
    return out;
  }
  void check(const Selection& selection, const char* role) {
    if (!options_.check) return;
    const HostSelection host(scratch_, selection);
    host.check_guards(strategy_.culprit(role));
    check_selection(strategy_.culprit(role), host.view(), visible(selection.rows).data());
  }

  /// Scores of a range as they will be ranked: reduced over groups.
  Scores scored(i32 begin, i32 count, Choice& out) {
    const i64 n = units();
    const Scores scores =
        ask_scores(strategy_, cache_, span_, scratch_,
                   {rows(plan().per_query_head, begin, count), nullptr, n, static_cast<i32>(n), plan().unit_tokens, -1},
                   rows(!reduced(), begin, count), options_.check, 1.0);
    if (options_.keep_scores) keep_scores(scores, out);
    return scores;
  }

  void keep_scores(const Scores& scores, Choice& out) {
    const i64 n = scores.units;
    if (out.scores.empty()) {
      out.scores.assign(static_cast<std::size_t>(rows(scores.rows.per_query_head, 0, tiles()).count() * n),
                        -std::numeric_limits<float>::infinity());
      out.scores_stride = n;
    }
    const std::vector<float> host = scratch_.read(scores.value, scores.rows.count() * n);
    for (i64 r = 0; r < scores.rows.count(); ++r) {
      const i64 row = scores.rows.head_of(r) * static_cast<i64>(tiles()) + scores.rows.tile_of(r);
      const i64 end = row_slots(length_.data(), scores.rows, r, layer_.num_kv_heads).end;
      std::copy_n(host.begin() + r * n, (end + scores.unit_tokens - 1) / scores.unit_tokens,
                  out.scores.begin() + row * n);
    }
  }

  /// An allocator moves pairs between the rows of the range.
  void allocate(Scores& scores, Budget& budget, Choice& out) {
    const i64 n = budget.rows.count();
    if (!strategy_.comparable_across_heads()) {
      i32* count = scratch_.take<i32>(n);
      row_units(device_, kv_.length, budget.rows, rule_, count);
      strategy_.with_ops(cache_, span_, [&](CoreOps& ops) {
        ops.rank_normalise(scores.value, static_cast<i32>(n), scores.stride, count);
      });
      out.rank_normalised = true;
    }
    i64* before = scratch_.take<i64>(n);
    device_.copy(before, budget.pairs, static_cast<std::size_t>(n) * sizeof(i64));
    allocator_->allocate_rows(cache_, span_, &scores, budget);
    if (options_.check) {
      i64 total = 0;
      for (const i64 p : scratch_.read(before, n)) total += p;
      check_budget(allocator_->culprit("allocate_rows"), HostBudget(scratch_, budget).view(), total);
    }
    follow_pairs(device_, kv_.length, layer_.num_kv_heads, before, budget);
  }

  /// Ranked units that any row can take at most: what the lists must have room for.
  i64 most_ranked(const Rows& of) const {
    if (allocator_ || rule_.top_p >= 0) return units();
    i64 most = 0;
    for (i64 r = 0; r < of.count(); ++r) {
      const RowSlots at = row_slots(length_.data(), of, r, layer_.num_kv_heads);
      const i64 tokens = rule_.target.tokens(at.end);
      if (rule_.target.limited() && tokens >= at.end) continue;
      const ForcedUnits forced(rule_, at);
      most = std::max(
          most, std::min<i64>(ranked_count(rule_, forced, at, tokens, capped_pairs(tokens, at.begin, at.end)).units,
                              forced.units));
    }
    return most;
  }

  /// score -> reduce -> targets -> allocate -> rank.
  Selection rank(i32 begin, i32 count, Choice& out) {
    const i64 n = units();
    const i32 unit = plan().unit_tokens;
    const Rows ranked = rows(!reduced(), begin, count);
    // The result first: what it is made from may go before it is used.
    const i64 row_span = q_tile_ / unit + 2;  // units that a tile's own queries can lie in
    const i64 ranked_room = most_ranked(ranked);
    const i64 forced_room = plan().first_units + (plan().last_units > 0 ? plan().last_units + row_span : 0);
    const i64 room = plan().first_units + std::min(ranked_room + forced_room, n + 1);
    Selection chosen =
        make_selection(scratch_, ranked, unit > 1 ? unit : 0, unit > 1 ? room : 0, unit > 1 ? 0 : room, false);
    const Scratch::Frame frame(scratch_);
    Scores scores = scored(begin, count, out);
    Budget budget = targets(ranked);
    if (allocator_) allocate(scores, budget, out);
    RankRule rule = rule_;
    if (budget.limited && !rule.target.limited()) {  // the allocator's own targets
      rule.target.kind = BudgetSpec::Kind::tokens;
      rule.top_p = -1;
    }

    const i64 m = ranked.count();
    i32* ints = scratch_.take<i32>(4 * m);
    const bool by_mass = rule.top_p >= 0;
    const RankCounts counts{ints, ints + m, ints + 2 * m, by_mass ? scratch_.take<double>(m) : nullptr};
    i32* taken = ints + 3 * m;
    double* partial = by_mass ? scratch_.take<double>(m * mass_partials(n)) : nullptr;
    count_rows(device_, kv_.length, rule, budget, scores.value, n, partial, counts);
    mask_settled(device_, kv_.length, rule, ranked, scores.value, n);
    i32* const lists = (unit > 1 ? chosen.pieces : chosen.tokens) + plan().first_units;
    strategy_.with_ops(cache_, span_, [&](CoreOps& ops) {
      if (by_mass)
        return ops.top_mass(scores.value, static_cast<i32>(m), n, counts.units, counts.mass, lists, taken, room);
      sdk::Error error{};
      if (ops.topk(scores.value, static_cast<i32>(m), n, counts.units, counts.wanted, lists, taken, room, &error) != 0)
        refuse("could not be ranked", "", error.text);
    });
    write_rows(device_, kv_.length, rule, budget, taken, chosen);
    account(out, budget, unit);
    if (options_.account)
      for (const i32 floor : scratch_.read(counts.floor, m)) out.budget.floor |= floor != 0;
    return chosen;
  }

  Selection mark(i32 begin, i32 count, Choice& out) {
    const Rows of = rows(plan().per_query_head, begin, count);
    Selection chosen = make_selection(scratch_, of, kv_block(), piece_capacity(), token_capacity(), plan().weighted);
    if (strategy_.adds_extras()) give_extras(scratch_, chosen, plan().max_extras, layer_.head_dim);
    const Scratch::Frame frame(scratch_);
    const Budget budget = targets(of);
    strategy_.mark(cache_, span_, budget, chosen);
    check(chosen, "mark");
    widen_exact(device_, chosen, plan().sinks, plan().recent);
    account(out, budget, plan().unit_tokens);
    return chosen;
  }

  /// The base's choice as token lists per query head, narrowed or re-weighted.
  Selection refine(i32 begin, i32 count, Choice& out) {
    const Rows of = rows(true, begin, count);
    Selection chosen = make_selection(scratch_, of, 0, 0, kv_.max_length, weighted());
    const Scratch::Frame frame(scratch_);
    Choice of_base;
    of_base.rows = base_->result_rows();
    const Selection base = base_->choose_range(begin, count, of_base);
    const Attention reading{layer_, kv_, setup_.queries.span(layer_, span_.begin, span_.end)};
    list_cells(scratch_, reading, base, chosen);
    const Budget budget = targets(of);
    strategy_.refine(cache_, span_, budget, chosen);
    check(chosen, "refine");
    // What the wrapper itself forces; the base's exact parts are listed.
    widen_exact(device_, chosen, plan().sinks, plan().recent);
    account(out, budget, 1);
    return chosen;
  }

  StrategyRuntime& strategy_;
  StrategyRuntime* allocator_;  // null unless it allocates rows
  KvCache& cache_;
  const Layer& layer_;
  const LayerSetup& setup_;
  Scratch& scratch_;
  Device& device_;
  CallSpan span_;
  ChooseOptions options_;
  Paged kv_;
  std::vector<i32> length_;  // of the KV heads, on the host
  RankRule rule_;
  i32 q_tile_ = 1;
  std::unique_ptr<Chooser> base_;
};

/// Bookkeeping of a range, as far as it is asked for.
void note(Choice& out, const ChooseOptions& options, Scratch& scratch, const Selection& selection, const Layer& layer,
          const std::vector<i32>& length) {
  if (!options.account && !options.keep_lists) return;
  const HostSelection host(scratch, selection);
  if (options.account) account_range(out, host.view(), layer, length);
  if (options.keep_lists) keep_lists(out, host.view());
}

}  // namespace

Choice choose(StrategyRuntime& strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
              const CallSpan& span, const ChooseOptions& options, const RangeVisitor& visit) {
  Chooser chooser(strategy, allocator, cache, setup, span, options);
  Choice out;
  out.rows = chooser.result_rows();
  out.kv_block = chooser.kv_block();
  out.weighted = chooser.weighted();
  const i32 tiles = chooser.tiles(), at_once = chooser.tiles_at_once();
  for (i32 begin = 0; begin < tiles; begin += at_once) {
    const Scratch::Frame frame(*setup.scratch);
    const Selection chosen = chooser.choose_range(begin, std::min(at_once, tiles - begin), out);
    note(out, options, *setup.scratch, chosen, setup.layer, chooser.length());
    visit(chosen);
  }
  return out;
}

Choice choose_everything(const KvCache& cache, const LayerSetup& setup, const CallSpan& span, i32 q_tile,
                         const ChooseOptions& options, const RangeVisitor& visit) {
  const i64 queries = span.end - span.begin;
  const i32 tiles = static_cast<i32>((queries + q_tile - 1) / q_tile);
  Choice out;
  out.rows = {1, setup.layer.num_kv_heads, 0, tiles, q_tile, 0, queries, span.begin};
  Scratch& scratch = *setup.scratch;
  const Scratch::Frame frame(scratch);
  const Selection all = make_selection(scratch, out.rows, 0, 0, 0, false);
  fill_rows(scratch.device(), all.full, 1, out.rows.count());
  note(out, options, scratch, all, setup.layer, lengths_of(cache, setup.layer.num_kv_heads));
  visit(all);
  return out;
}

}  // namespace lacuna
