#include "lacuna/pipeline/select.hpp"

#include <algorithm>
#include <limits>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "pipeline/row_lists.hpp"
#include "pipeline/rows.hpp"

namespace lacuna {
using namespace sdk;

namespace {
/// Everything about a call that its rows share.
struct Setting {
  StrategyRuntime& strategy;
  StrategyRuntime* allocator;
  KvCache& cache;
  const LayerSetup& setup;
  CallSpan span;
  ChooseOptions options;
  Paged kv;
  i64 constant = 0;  // constant_tokens of the prompt

  const Plan& plan() const { return strategy.plan(); }
  const BudgetSpec& budget() const { return strategy.resolved().budget; }
  bool grouped() const {  // rows are KV heads once the scores are reduced
    const Gqa g = strategy.gqa();
    return !plan().per_query_head || g == Gqa::mean || g == Gqa::max || g == Gqa::sum;
  }
  i64 queries() const { return span.end - span.begin; }
  i32 tiles() const { return static_cast<i32>((queries() + plan().q_tile - 1) / plan().q_tile); }
  Rows rows(bool per_query_head, i32 tile_begin, i32 tiles) const {
    return {1,
            per_query_head ? setup.layer.num_qo_heads : setup.layer.num_kv_heads,
            tile_begin,
            tiles,
            plan().q_tile,
            per_query_head,
            queries(),
            span.begin};
  }
  RowSlots slots(const Rows& r, i64 row) const { return row_slots(kv, r, row, setup.layer.num_kv_heads); }
};

/// Targets of the rows before allocation.
OwnedBudget targets(const Setting& s, const Rows& rows) {
  OwnedBudget out(rows);
  Budget& b = out.view();
  b.limited = s.budget().kind == BudgetSpec::Kind::density || s.budget().kind == BudgetSpec::Kind::tokens ||
              s.budget().kind == BudgetSpec::Kind::units;
  b.density = s.budget().kind == BudgetSpec::Kind::density ? s.budget().value : 0;
  b.sinks = s.plan().sinks;
  b.recent = s.plan().recent;
  for (i64 r = 0; r < rows.count(); ++r) {
    const RowSlots at = s.slots(rows, r);
    b.tokens[r] = s.span.phase == Phase::prefill ? tile_tokens(s.budget(), s.constant, at.end, s.plan().unit_tokens)
                                                 : cached_tokens_target(s.budget(), at.end, s.plan().unit_tokens);
    b.pairs[r] = capped_pairs(b.tokens[r], at.begin, at.end);
  }
  return out;
}

/// The units a row must read: the first ones and the diagonal's (or current) one and those before it.
std::vector<i32> forced_units(const Plan& plan, RowSlots at) {
  const i32 unit = plan.unit_tokens, last = static_cast<i32>((at.end - 1) / unit),
            diagonal = static_cast<i32>(at.begin / unit);
  std::vector<i32> out;
  for (i32 u = 0; u < plan.first_units && u <= last; ++u) out.push_back(u);
  if (plan.last_units > 0)
    for (i32 u = std::max(diagonal - plan.last_units + 1, static_cast<i32>(out.size())); u <= last; ++u)
      out.push_back(u);
  return out;
}

/// Ranks one row: forced units, then the best of the others up to the target (or to the mass, or to the method's own
/// count).
RowLists rank_row(const Setting& s, const Budget& budget, i64 row, const float* value, i64 n, BudgetAccount& account) {
  const Plan& plan = s.plan();
  const RowSlots at = s.slots(budget.rows, row);
  const i64 queries = at.end - at.begin;
  RowLists out;
  const Rule rule = static_cast<Rule>(budget.rule[row]);
  if (rule == Rule::full || (rule == Rule::ranked && budget.limited && budget.tokens[row] >= at.end)) {
    out.full = 1;
    return out;
  }
  if (rule == Rule::window) {
    out.sinks = budget.window_sinks[row];
    out.window = budget.window_recent[row];
    return out;
  }
  out.sinks = plan.sinks;
  out.window = plan.recent;
  const std::vector<i32> forced = forced_units(plan, at);
  RowLists forced_only = out;
  (plan.unit_tokens == 1 ? forced_only.tokens : forced_only.pieces) = forced;
  for (i32& u : forced_only.pieces) u *= plan.unit_tokens;
  const OwnedSelection one =
      pack(s.rows(budget.rows.per_query_head, 0, 1), plan.unit_tokens == 1 ? 0 : plan.unit_tokens,
           std::vector<RowLists>(static_cast<std::size_t>(budget.rows.heads), forced_only), false);
  const RowSet forced_set = expand_row(one.view(), 0, at.end);

  // Forced units and tokens that are read anyway do not compete.
  std::vector<float> candidate(value, value + n);
  for (const i32 u : forced) candidate[static_cast<std::size_t>(u)] = -std::numeric_limits<float>::infinity();
  if (plan.unit_tokens == 1)
    for (const i32 j : forced_set.cells(at.begin, at.end))
      if (j < n) candidate[static_cast<std::size_t>(j)] = -std::numeric_limits<float>::infinity();

  std::vector<i32> chosen;
  const i64 forced_count = static_cast<i64>(forced.size()) + (plan.sinks + plan.recent > 0 ? 1 : 0);
  // Nor do units that the exact sinks and window hold for every query of the row.
  const i64 window_begin = plan.recent > 0 ? at.end - plan.recent : at.end;
  if (plan.unit_tokens > 1)
    for (i64 u = 0; u < n; ++u) {
      const i64 begin = std::max<i64>(u * plan.unit_tokens, plan.sinks),
                end = std::min((u + 1) * plan.unit_tokens, at.end);
      if (begin >= end || begin >= window_begin)
        candidate[static_cast<std::size_t>(u)] = -std::numeric_limits<float>::infinity();
    }

  const double top_p = s.budget().kind == BudgetSpec::Kind::mass ? s.budget().value : plan.threshold;
  if (rule == Rule::none) {
  } else if (budget.limited) {
    i64 k;
    if (s.budget().kind == BudgetSpec::Kind::units) {
      const i64 wanted = budget.tokens[row] / plan.unit_tokens;
      k = std::max<i64>(0, wanted - static_cast<i64>(forced.size()));
      account.floor |= static_cast<i64>(forced.size()) > wanted;
    } else {
      const i64 forced_pairs = forced_set.pairs(at.begin, at.end);
      k = ranked_units(budget.pairs[row], forced_pairs, forced_count, plan.unit_tokens, queries, plan.min_units);
      const i64 unit_pairs = plan.unit_tokens * queries;
      const i64 least =
          std::max(forced_pairs, forced_pairs + (std::max<i64>(1, plan.min_units) - forced_count) * unit_pairs);
      // A tile that straddles K has a smaller target than the ones after it; what counts is whether K itself has room.
      account.floor |= least > std::max(budget.pairs[row], budget.tokens[row] * queries);
    }
    chosen = top_units(candidate, k);
  } else if (top_p >= 0 && plan.score_kind == ScoreKind::mass) {
    chosen = top_mass_units(candidate, std::vector<float>(value, value + n), forced, top_p);
  } else {
    const i64 k = plan.default_units - static_cast<i64>(forced.size());
    chosen = top_units(candidate, std::max(k, std::max<i64>(1, plan.min_units) - forced_count));
  }
  chosen.insert(chosen.end(), forced.begin(), forced.end());
  std::sort(chosen.begin(), chosen.end());
  if (plan.unit_tokens == 1) {
    out.tokens = std::move(chosen);
  } else {
    for (const i32 u : chosen) out.pieces.push_back(u * plan.unit_tokens);
  }
  return out;
}

/// score -> reduce -> targets -> allocate -> rank, a range of tiles at a time.
std::vector<RowLists> rank_all(Setting& s, Choice& out, Rows& all) {
  const Plan& plan = s.plan();
  const bool by_rules = s.allocator && s.allocator->instance().has_allocate_rows();
  if (s.budget().kind == BudgetSpec::Kind::none && plan.default_units < 0 &&
      !(plan.threshold >= 0 && plan.score_kind == ScoreKind::mass) && !by_rules)
    throw lacuna::Error(Problem{std::string("strategy '") + s.strategy.entry().name + "' needs a budget",
                                "density, tokens, units or mass", "none", "the select role",
                                "give the role density = ..., or the scenario a [budget]"});
  if (s.budget().kind == BudgetSpec::Kind::mass && plan.score_kind != ScoreKind::mass)
    throw lacuna::Error(Problem{std::string("strategy '") + s.strategy.entry().name + "' cannot be cut by mass",
                                "scores of kind mass", "scores that only rank", "the select role",
                                "give density, tokens or units instead"});
  const i32 tiles = s.tiles(), unit = plan.unit_tokens;
  const i32 units = (s.kv.max_length + unit - 1) / unit;
  const Rows whole_scored = s.rows(plan.per_query_head, 0, tiles);
  all = s.rows(!s.grouped(), 0, tiles);
  std::vector<RowLists> lists(static_cast<std::size_t>(all.count()));
  const i64 per_tile = static_cast<i64>(whole_scored.heads) * units;
  const i32 range = static_cast<i32>(std::clamp<i64>(s.options.score_floats / std::max<i64>(per_tile, 1), 1, tiles));
  if (s.options.keep_scores) {
    out.scores.assign(static_cast<std::size_t>(all.count() * units), -std::numeric_limits<float>::infinity());
    out.scores_stride = units;
  }
  std::vector<float> values, reduced;
  for (i32 t0 = 0; t0 < tiles; t0 += range) {
    const i32 nt = std::min(range, tiles - t0);
    const Rows scored = s.rows(plan.per_query_head, t0, nt), ranked = s.rows(!s.grouped(), t0, nt);
    values.assign(static_cast<std::size_t>(scored.count() * units), -std::numeric_limits<float>::infinity());
    Scores scores{scored, values.data(), units, units, unit, -1};
    s.strategy.score(s.cache, s.span, scores);
    if (s.options.check) check_scores(s.strategy.culprit("score"), scores, plan.score_kind, 1.0);
    if (plan.per_query_head && s.grouped()) {
      reduced = reduce_rows(values, s.setup.layer, nt, units, s.strategy.gqa());
      scores.value = reduced.data();
      scores.rows = ranked;
    }
    OwnedBudget owned = targets(s, ranked);
    Budget& budget = owned.view();
    if (s.allocator && s.allocator->instance().has_allocate_rows()) {
      i64 total = 0;
      for (i64 r = 0; r < ranked.count(); ++r) total += budget.pairs[r];
      if (!s.strategy.entry().comparable_across_heads) {
        std::vector<i64> count(static_cast<std::size_t>(ranked.count()));
        for (i64 r = 0; r < ranked.count(); ++r)
          count[static_cast<std::size_t>(r)] = (s.slots(ranked, r).end + unit - 1) / unit;
        rank_normalise(scores.value, ranked.count(), units, count);
        out.rank_normalised = true;
      }
      const std::vector<i64> before(budget.pairs, budget.pairs + ranked.count());
      s.allocator->allocate_rows(s.cache, s.span, &scores, budget);
      if (s.options.check) check_budget(s.allocator->culprit("allocate_rows"), budget, total);
      for (i64 r = 0; r < ranked.count(); ++r) {
        const RowSlots at = s.slots(ranked, r);
        if (budget.pairs[r] != before[static_cast<std::size_t>(r)])
          budget.tokens[r] = budget.pairs[r] / (at.end - at.begin);
      }
    }
    std::vector<BudgetAccount> accounts(static_cast<std::size_t>(ranked.count()));
#pragma omp parallel for schedule(dynamic, 4)
    for (i64 r = 0; r < ranked.count(); ++r) {
      const RowSlots at = s.slots(ranked, r);
      const i64 n = (at.end + unit - 1) / unit;
      const i64 row = ranked.head_of(r) * static_cast<i64>(tiles) + ranked.tile_of(r);
      lists[static_cast<std::size_t>(row)] =
          rank_row(s, budget, r, scores.value + r * units, n, accounts[static_cast<std::size_t>(r)]);
      if (s.options.keep_scores) std::copy_n(scores.value + r * units, n, out.scores.data() + row * units);
    }
    for (i64 r = 0; r < ranked.count(); ++r) {
      out.budget.add(accounts[static_cast<std::size_t>(r)]);
      if (budget.limited && budget.rule[r] == static_cast<i32>(Rule::ranked))
        account_target(out.budget, s.setup.layer, ranked, s.slots(ranked, r), budget.pairs[r], unit);
    }
  }
  return lists;
}

/// mark(): the whole call at once.
std::vector<RowLists> mark_all(Setting& s, Choice& out, Rows& all) {
  const Plan& plan = s.plan();
  all = s.rows(plan.per_query_head, 0, s.tiles());
  OwnedBudget owned = targets(s, all);
  Budget& budget = owned.view();
  const i64 longest = s.kv.max_length;
  const i64 pieces = plan.max_pieces >= 0 ? plan.max_pieces : plan.unit_tokens > 1 ? longest / plan.unit_tokens + 1 : 0;
  OwnedSelection room(all, plan.unit_tokens > 1 ? plan.unit_tokens : 0, pieces,
                      plan.max_tokens >= 0 ? plan.max_tokens : longest, plan.weighted);
  s.strategy.mark(s.cache, s.span, budget, room.view());
  std::vector<RowLists> lists(static_cast<std::size_t>(all.count()));
  std::vector<i64> visible(lists.size());
  for (i64 r = 0; r < all.count(); ++r) visible[static_cast<std::size_t>(r)] = s.slots(all, r).end;
  if (s.options.check) check_selection(s.strategy.culprit("mark"), room.view(), visible.data());
  for (i64 r = 0; r < all.count(); ++r) {
    RowLists& l = lists[static_cast<std::size_t>(r)] = unpack(room.view(), r);
    l.sinks = std::max(l.sinks, plan.sinks);
    l.window = std::max(l.window, plan.recent);
    if (!budget.limited) continue;
    account_target(out.budget, s.setup.layer, all, s.slots(all, r), budget.pairs[r], plan.unit_tokens);
  }
  return lists;
}

/// refine(): the base's choice as token lists per query head, narrowed or re-weighted.
std::vector<RowLists> refine_all(Setting& s, Choice& out, Rows& all) {
  const Choice base = choose(*s.strategy.base(), nullptr, s.cache, s.setup, s.span, {s.options.check});
  all = s.rows(true, 0, base.tiles);
  all.q_tile = base.q_tile;
  OwnedBudget owned = targets(s, all);
  const Budget& budget = owned.view();
  const bool base_weighted = base.selection.view().token_log_weight != nullptr;
  OwnedSelection room(all, 0, 0, s.kv.max_length, s.plan().weighted || base_weighted);
  Selection& sel = room.view();
  std::vector<i64> visible(static_cast<std::size_t>(all.count()));
  for (i64 r = 0; r < all.count(); ++r) {
    const RowSlots at = s.slots(all, r);
    visible[static_cast<std::size_t>(r)] = at.end;
    const RowSet& set = base.sets[static_cast<std::size_t>(r)];
    const std::vector<i32> cells = set.cells(at.begin, at.end);
    std::copy(cells.begin(), cells.end(), sel.tokens + r * sel.token_capacity);
    sel.token_count[r] = static_cast<i32>(cells.size());
    if (set.log_weight.empty()) continue;
    for (std::size_t i = 0, listed = 0; i < cells.size() && listed < set.slots.size();
         ++i)  // cells beside the list weigh 0
      if (cells[i] == set.slots[listed])
        sel.token_log_weight[r * sel.token_capacity + static_cast<i64>(i)] = set.log_weight[listed++];
  }
  s.strategy.refine(s.cache, s.span, budget, sel);
  if (s.options.check) check_selection(s.strategy.culprit("refine"), sel, visible.data());
  std::vector<RowLists> lists;
  for (i64 r = 0; r < all.count(); ++r) {
    lists.push_back(unpack(sel, r));
    lists.back().sinks = s.plan().sinks;
    lists.back().window = s.plan().recent;
    if (budget.limited) account_target(out.budget, s.setup.layer, all, s.slots(all, r), budget.pairs[r], 1);
  }
  return lists;
}

/// What cannot be done to a choice that is not made by scores.
void check_explicit(const Setting& s) {
  const Gqa g = s.strategy.gqa();
  const auto refuse = [&](const char* what, const char* expected, const char* found) {
    throw lacuna::Error(Problem{std::string("strategy '") + s.strategy.entry().name + "' " + what, expected, found,
                                "the select role", ""});
  };
  if (s.budget().kind == BudgetSpec::Kind::mass) refuse("cannot be cut by mass", "density, tokens or units", "mass");
  if (s.plan().per_query_head && g != Gqa::none && g != Gqa::union_)
    refuse("chooses for each query head by itself, so that a group has nothing to reduce", "gqa = none or union",
           "mean, max or sum");
  if (s.plan().weighted && g == Gqa::union_)
    refuse("weights what it reads for each query head, which a union would lose", "gqa = none", "union");
  if (s.strategy.base() && s.strategy.base()->plan().weighted && !s.plan().weighted)
    refuse("keeps no log weights, and its base samples with them", "a base without log weights",
           s.strategy.base()->entry().name);
}

/// Pairs of the listed columns that causality cuts off: ranking counts a unit on the diagonal as if every query saw it.
i64 causal_loss(const RowSet& set, RowSlots at) {
  i64 lost = 0;
  for (auto j = set.slots.rbegin(); j != set.slots.rend() && *j > at.begin; ++j) lost += *j - at.begin;
  return lost;
}

/// The canonical sets of every (query head, tile), and what they cost.
void expand_all(const Setting& s, const Rows& rows, Choice& out) {
  const Layer& layer = s.setup.layer;
  const i32 group = layer.group();
  out.q_tile = rows.q_tile;
  out.tiles = rows.tiles;
  out.sets.resize(static_cast<std::size_t>(layer.num_qo_heads) * static_cast<std::size_t>(rows.tiles));
  const Selection& sel = out.selection.view();
  const i64 kv_rows = static_cast<i64>(layer.num_kv_heads) * rows.tiles;
  std::vector<BudgetAccount> accounts(static_cast<std::size_t>(kv_rows));
  std::vector<double> touched(static_cast<std::size_t>(kv_rows));
#pragma omp parallel for schedule(dynamic, 4)
  for (i64 kr = 0; kr < kv_rows; ++kr) {
    const i64 kv_head = kr / rows.tiles, tile = kr % rows.tiles;
    std::vector<const RowSet*> members;
    BudgetAccount& a = accounts[static_cast<std::size_t>(kr)];
    RowSlots at{};
    for (i32 g = 0; g < group; ++g) {
      const i64 head = kv_head * group + g, row = (rows.per_query_head ? head : kv_head) * rows.tiles + tile;
      at = s.slots(rows, row);
      RowSet& set = out.sets[static_cast<std::size_t>(head * rows.tiles + tile)];
      set = expand_row(sel, row, at.end);
      members.push_back(&set);
      a.realised_pairs += static_cast<double>(set.pairs(at.begin, at.end));
      a.causal_loss += static_cast<double>(causal_loss(set, at));
      a.visible_pairs += static_cast<double>(capped_pairs(at.end, at.begin, at.end));
    }
    const RowSet all = rows.per_query_head ? unite(members) : *members[0];
    a.union_pairs = static_cast<double>(all.pairs(at.begin, at.end));
    a.union_visible = static_cast<double>(capped_pairs(at.end, at.begin, at.end));
    touched[static_cast<std::size_t>(kr)] = static_cast<double>(all.touched(at.begin, at.end));
  }
  for (i64 kr = 0; kr < kv_rows; ++kr) {
    out.budget.add(accounts[static_cast<std::size_t>(kr)]);
    out.touched_tokens += touched[static_cast<std::size_t>(kr)];
  }
}

}  // namespace

void BudgetAccount::add(const BudgetAccount& o) {
  target_pairs += o.target_pairs;
  realised_pairs += o.realised_pairs;
  union_pairs += o.union_pairs;
  visible_pairs += o.visible_pairs;
  union_visible += o.union_visible;
  slack_pairs += o.slack_pairs;
  causal_loss += o.causal_loss;
  floor |= o.floor;
}

Choice choose(StrategyRuntime& strategy, StrategyRuntime* allocator, KvCache& cache, const LayerSetup& setup,
              const CallSpan& span, const ChooseOptions& options) {
  Setting s{strategy, allocator, cache, setup, span, options, cache.view()};
  if (span.phase == Phase::prefill && s.budget().kind == BudgetSpec::Kind::density)
    s.constant = constant_tokens(s.budget().value, span.end);
  Choice out;
  Rows rows{};
  const Instance& instance = strategy.instance();
  if (instance.has_refine() || instance.has_mark()) check_explicit(s);
  std::vector<RowLists> lists = instance.has_refine() ? refine_all(s, out, rows)
                                : instance.has_mark() ? mark_all(s, out, rows)
                                                      : rank_all(s, out, rows);
  if (strategy.gqa() == Gqa::union_ && rows.per_query_head) {
    const Rows grouped = [&] {
      Rows r = s.rows(false, 0, rows.tiles);
      r.q_tile = rows.q_tile;
      return r;
    }();
    std::vector<RowLists> united;
    for (i32 h = 0; h < grouped.heads; ++h)
      for (i32 t = 0; t < grouped.tiles; ++t) united.push_back(unite_lists(lists, rows, h, setup.layer.group(), t));
    lists = std::move(united);
    rows = grouped;
  }
  const bool weighted = std::any_of(lists.begin(), lists.end(), [](const RowLists& l) {
    return !l.piece_weights.empty() || !l.token_weights.empty();
  });
  out.selection = pack(rows, strategy.plan().unit_tokens > 1 ? strategy.plan().unit_tokens : 0, lists, weighted);
  expand_all(s, rows, out);
  return out;
}

Choice choose_everything(const KvCache& cache, const LayerSetup& setup, const CallSpan& span, i32 q_tile) {
  const i64 queries = span.end - span.begin;
  const i32 tiles = static_cast<i32>((queries + q_tile - 1) / q_tile);
  const Layer& layer = setup.layer;
  const Rows rows{1, layer.num_kv_heads, 0, tiles, q_tile, 0, queries, span.begin};
  Choice out;
  out.q_tile = q_tile;
  out.tiles = tiles;
  out.selection = OwnedSelection(rows, 0, 0, 0, false);
  const Paged kv = cache.view();
  for (i64 r = 0; r < rows.count(); ++r) {
    out.selection.view().full[r] = 1;
    const RowSlots at = row_slots(kv, rows, r, layer.num_kv_heads);
    const double visible = static_cast<double>(capped_pairs(at.end, at.begin, at.end));
    out.budget.union_pairs += visible;
    out.budget.union_visible += visible;
    out.budget.realised_pairs += visible * layer.group();
    out.budget.visible_pairs += visible * layer.group();
    out.touched_tokens += static_cast<double>(at.end);
  }
  for (i32 h = 0; h < layer.num_qo_heads; ++h)
    for (i32 t = 0; t < tiles; ++t) {
      const i64 row = static_cast<i64>(h / layer.group()) * tiles + t;
      out.sets.push_back(expand_row(out.selection.view(), row, row_slots(kv, rows, row, layer.num_kv_heads).end));
    }
  return out;
}

}  // namespace lacuna
