#include "replay/phase_run.hpp"

#include <algorithm>
#include <cmath>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "lacuna/replay/replay.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// Bookkeeping while a phase runs.
class Collector {
 public:
  Collector(PhaseRun& run, LayerReplay& layer, i64 queries, const PhaseOptions& options)
      : run_(run), layer_(layer), queries_(queries), options_(options) {
    const Layer& l = layer.layer();
    run.out.resize(static_cast<std::size_t>(l.num_qo_heads * queries * l.head_dim));
    run.lse.resize(static_cast<std::size_t>(l.num_qo_heads * queries));
  }

  /// Queries [first, first + n) of the phase.
  void add(const Step& step, i64 first, i64 n) {
    const Layer& l = layer_.layer();
    const i64 d = l.head_dim;
    if (options_.on_step) options_.on_step(step);
    for (i64 h = 0; h < l.num_qo_heads; ++h) {
      std::copy_n(step.out.begin() + h * n * d, n * d, run_.out.begin() + (h * queries_ + first) * d);
      std::copy_n(step.lse.begin() + h * n, n, run_.lse.begin() + h * queries_ + first);
    }
    account_.add(step.choice.budget);
    run_.work.dense_rows += step.work.dense_rows;
    run_.work.sparse_rows += step.work.sparse_rows;
    run_.work.pairs += step.work.pairs;
    run_.cost.touched_bytes += step.choice.touched_tokens * token_bytes();
    rank_normalised_ |= step.choice.rank_normalised;
  }

  /// K + V bytes of a token of one KV head.
  double token_bytes() const {
    return 2.0 * layer_.layer().head_dim * static_cast<double>(size_of(layer_.tensors().k.dtype));
  }
  const BudgetAccount& account() const { return account_; }
  bool rank_normalised() const { return rank_normalised_; }

 private:
  PhaseRun& run_;
  LayerReplay& layer_;
  i64 queries_;
  const PhaseOptions& options_;
  BudgetAccount account_;
  bool rank_normalised_ = false;
};

void mark_account(PhaseRun& run, const BudgetAccount& a) {
  if (a.visible_pairs > 0) run.realised_head = a.realised_pairs / a.visible_pairs;
  if (a.union_visible > 0) run.realised_union = a.union_pairs / a.union_visible;
  if (a.target_pairs > 0) run.target_share = a.target_pairs / a.visible_pairs;
  if (a.floor) run.marks.push_back("floor");
}

/// Of a strategy and its bases.
template <class F>
bool any_of_chain(const Resolved& role, F holds) {
  for (const Resolved* r = &role; r; r = r->base.get())
    if (holds(r->type->entry())) return true;
  return false;
}

/// An eviction that keeps more or less than it was asked to, by more than 1 % and one unit a head.
void mark_kept(PhaseRun& run, const Eviction& e, i32 num_kv_heads) {
  if (!e.limited || e.floor) return;
  const double target = static_cast<double>(e.target_tokens * num_kv_heads);
  if (std::abs(e.kept_tokens - target) > std::max(0.01 * target, static_cast<double>(e.unit_tokens * num_kv_heads)))
    run.marks.push_back("off-budget");
}

/// The same of a selection. An explicit choice exceeds its target only where its forced part does not fit; a wrapper's
/// budget is a bound, so it may read less; what causality cuts off listed units excuses a shortfall.
void mark_read(PhaseRun& run, const BudgetAccount& a, const sdk::Entry& entry) {
  if (a.floor) return;
  const double off = a.realised_pairs - a.target_pairs, one_percent = 0.01 * a.target_pairs;
  if (entry.mark && off > one_percent)
    run.marks.push_back("floor");
  else if (off > std::max(one_percent, a.slack_pairs))
    run.marks.push_back("off-budget");
  else if (!entry.refine && -off > std::max(one_percent, a.slack_pairs + a.causal_loss))
    run.marks.push_back("off-budget");
}

/// Prefill: select over the whole prompt.
void run_prefill(PhaseRun& run, LayerPipeline& pipeline, Collector& collect, i64 queries) {
  Step step = pipeline.prefill();
  collect.add(step, 0, queries);
  run.sets = std::move(step.position_sets);
  run.q_tile = step.choice.q_tile();
  run.unweighted_out = std::move(step.unweighted_out);
  run.unweighted_lse = std::move(step.unweighted_lse);
}

/// One query at a time from `begin` on: decode steps, or every query after a cut of a method that evicts at each step.
void run_steps(PhaseRun& run, LayerReplay& layer, LayerPipeline& pipeline, Collector& collect, i64 begin, i64 end) {
  const Layer& l = layer.layer();
  const i64 queries = end - begin, d = l.head_dim;
  run.q_tile = 1;
  run.sets.resize(static_cast<std::size_t>(l.num_qo_heads * queries));
  run.unweighted_out.resize(run.out.size());
  run.unweighted_lse.resize(run.lse.size());
  bool weighted = false;
  for (i64 i = 0; i < queries; ++i) {
    Step step = pipeline.step(begin + i, i);
    collect.add(step, i, 1);
    for (i32 h = 0; h < l.num_qo_heads; ++h)
      run.sets[static_cast<std::size_t>(h * queries + i)] = std::move(step.position_sets[static_cast<std::size_t>(h)]);
    weighted |= !step.unweighted_out.empty();
    const bool plain = step.unweighted_out.empty();
    const std::vector<float>&out = plain ? step.out : step.unweighted_out,
          &lse = plain ? step.lse : step.unweighted_lse;
    for (i64 h = 0; h < l.num_qo_heads; ++h) {
      std::copy_n(out.begin() + h * d, d, run.unweighted_out.begin() + (h * queries + i) * d);
      run.unweighted_lse[static_cast<std::size_t>(h * queries + i)] = lse[static_cast<std::size_t>(h)];
    }
  }
  if (weighted) return;
  run.unweighted_out.clear();
  run.unweighted_lse.clear();
}

void mark_roles(PhaseRun& run, const Roles& roles, ReplayPhase phase) {
  for (const Resolved* role : {roles.select, roles.evict, roles.allocate})
    for (const Resolved* r = role; r; r = r->base.get()) {
      const auto& e = r->type->entry();
      if (e.clairvoyant) run.marks.push_back("clairvoyant");
      if (e.stochastic) run.marks.push_back("stochastic");
      if (e.query_aware && phase != ReplayPhase::prefill) run.marks.push_back("query-aware");
    }
}

}  // namespace

Roles roles_of(const Cell& cell, ReplayPhase phase) {
  Roles roles;
  if (phase != ReplayPhase::evict && cell.select) roles.select = &*cell.select;
  if (phase != ReplayPhase::prefill && cell.evict) roles.evict = &*cell.evict;
  if (cell.allocate && !(cell.evict && phase == ReplayPhase::prefill))
    roles.allocate = &*cell.allocate;  // beside evict it is evict's
  return roles;
}

bool runs_on_device(const Cell& cell) {
  for (const auto* role : {&cell.select, &cell.evict, &cell.allocate})
    for (const Resolved* r = *role ? &**role : nullptr; r; r = r->base.get())
      if (!r->type->has_device_code()) return false;
  return true;
}

PhaseQueries phase_queries(const TraceInfo& info, ReplayPhase phase, const std::string& cut) {
  switch (phase) {
    case ReplayPhase::prefill: return {0, info.prefill_tokens};
    case ReplayPhase::evict: return {cut_of(info, cut), info.tokens()};
    case ReplayPhase::decode: break;
  }
  return {info.prefill_tokens, info.tokens()};
}

std::string cut_parameter(const Cell& cell) {
  if (!cell.evict || !cell.evict->shared.contains("cut")) return "end";
  const Json& cut = cell.evict->shared["cut"];
  return cut.is_string() ? cut.get<std::string>() : cut.dump();
}

i64 cut_of(const TraceInfo& info, const std::string& cut) {
  if (cut == "end") return info.prefill_tokens;
  if (cut == "before_question") {
    const auto question = info.segment("question");
    if (!question)
      throw lacuna::Error(Problem{"cut = before_question needs a question in the trace", "a segment named question",
                                  "none", info.path, "use cut = \"end\" or a token count"});
    return question->begin;
  }
  i64 at = -1;
  try {
    at = std::stoll(cut);
  } catch (const std::exception&) {
  }
  if (at < 1 || at > info.prefill_tokens)
    throw lacuna::Error(Problem{"a cut outside the prompt",
                                "end, before_question or 1.." + std::to_string(info.prefill_tokens), cut, info.path,
                                "change cut"});
  return at;
}

std::string why_skipped(const Cell& cell, ReplayPhase phase) {
  const auto has = [](const std::optional<Resolved>& role, Phases p) { return role && role->type->in_phase(p); };
  // Beside an evict role the allocator is that one's.
  if (cell.allocate && !cell.evict && cell.select && phase != ReplayPhase::evict &&
      !has(cell.allocate, phase == ReplayPhase::prefill ? kPrefill : kDecode))
    return "'" + cell.allocate->type->name() + "' does not allocate in " + name_of(phase);
  switch (phase) {
    case ReplayPhase::prefill:
      if (!cell.select) return "no select role";
      return has(cell.select, kPrefill) ? "" : "'" + cell.select->type->name() + "' does not select in prefill";
    case ReplayPhase::evict:
      if (cell.evict) return "";
      if (cell.select) return "no evict role";
      return has(cell.allocate, kEvict) ? "" : "no evict role";
    case ReplayPhase::decode:
      if (cell.select)
        return has(cell.select, kDecode) ? "" : "'" + cell.select->type->name() + "' does not select in decode";
      return cell.evict || has(cell.allocate, kEvict) ? "" : "no select or evict role";
  }
  return "";
}

std::string why_skipped(const Cell& cell, ReplayPhase phase, const TraceInfo& info) {
  std::string reason = why_skipped(cell, phase);
  if (!reason.empty() || phase == ReplayPhase::prefill) return reason;
  if (phase == ReplayPhase::decode && info.decode_tokens == 0) return "the trace has no decode tokens";
  try {
    if (cell.evict || !cell.select) cut_of(info, cut_parameter(cell));
  } catch (const lacuna::Error& e) {
    reason = e.what();
  }
  return reason;
}

PhaseRun run_phase(LayerReplay& layer, const TraceInfo& info, const Cell& cell, ReplayPhase phase, PhaseQueries queries,
                   const PhaseOptions& options) {
  PhaseRun run;
  const auto [begin, end] = queries;
  const Layer& l = layer.layer();
  LayerSetup setup = layer.setup(cell.seed, options.poison);
  setup.carried = options.carried;
  setup.entropy = options.entropy;
  const Roles roles = roles_of(cell, phase);
  const bool evicts = phase != ReplayPhase::prefill && (cell.evict || (cell.allocate && !cell.select));
  const i64 cut = evicts ? cut_of(info, cut_parameter(cell)) : begin;
  LayerPipeline pipeline(roles, setup, layer.fork(phase == ReplayPhase::prefill ? end : cut),
                         layer.choose_options(options.keep_lists, options.keep_scores));
  const auto rewrites = [](const std::optional<Resolved>& role) {
    return role && any_of_chain(*role, [](const sdk::Entry& e) { return e.rewrite != nullptr; });
  };
  const bool compacts = cell.evict && cell.evict->shared.value("positions", std::string()) == "compacted";
  run.other_keys = evicts && (compacts || rewrites(cell.evict) || rewrites(cell.allocate));
  Collector collect(run, layer, end - begin, options);

  Eviction eviction;
  if (evicts) {
    if (cell.evict && any_of_chain(*cell.evict, [](const sdk::Entry& e) { return e.attended != nullptr; })) {
      const std::vector<float> out = layer.dense_out(0, cut), lse = layer.dense_lse(0, cut);
      pipeline.observe_prefill(out, lse);
    }
    eviction = pipeline.evict_at_cut();
    if (options.on_eviction) options.on_eviction(eviction);
    if (eviction.floor) run.marks.push_back("floor");
    if (eviction.rank_normalised) run.marks.push_back("rank-normalised");
    if (std::abs(eviction.allocated_mean - static_cast<double>(eviction.mean_tokens)) >
        0.01 * static_cast<double>(eviction.mean_tokens))
      run.marks.push_back("off-budget");
  }

  if (phase == ReplayPhase::prefill) {
    run_prefill(run, pipeline, collect, end);
  } else if (phase == ReplayPhase::evict && !pipeline.evicts_while_decoding()) {
    const i64 n = end - begin;
    pipeline.append(begin, n);
    Step step = pipeline.read_cached(begin, end);
    collect.add(step, 0, n);
    run.q_tile = static_cast<i32>(n);
    run.sets = std::move(step.position_sets);
    for (const auto& kept : eviction.kept) run.kept.push_back(static_cast<i64>(kept.size()));
    if (run.kept.empty()) run.kept.assign(static_cast<std::size_t>(l.num_kv_heads), cut);
  } else {
    if (evicts && cut < begin) {
      if (pipeline.evicts_while_decoding()) {
        for (i64 at = cut; at < begin; ++at) pipeline.follow(at);
      } else {
        pipeline.append(cut, begin - cut);
        pipeline.read_cached(cut, begin);
      }
    }
    run_steps(run, layer, pipeline, collect, begin, end);
  }

  mark_account(run, collect.account());
  const double dense_pairs = static_cast<double>(l.num_qo_heads) * static_cast<double>(capped_pairs(end, begin, end));
  run.read_share = static_cast<double>(run.work.pairs) / dense_pairs;
  if (phase == ReplayPhase::evict && eviction.cached_tokens > 0) {
    run.realised_head = run.realised_union = (eviction.kept_tokens - eviction.dropped_tokens) / eviction.cached_tokens;
    run.target_share =
        eviction.limited ? static_cast<double>(eviction.target_tokens * l.num_kv_heads) / eviction.cached_tokens : 0;
    const bool free_union = cell.evict && cell.evict->common().gqa == Gqa::union_;
    if (!free_union) mark_kept(run, eviction, l.num_kv_heads);
  } else if (run.target_share > 0 && cell.select->common().gqa != Gqa::union_) {
    mark_read(run, collect.account(), cell.select->type->entry());
  }
  if (phase == ReplayPhase::decode && !cell.select) {  // nothing is selected: what is cached is what is read
    const double dropped = eviction.dropped_tokens * l.group() * static_cast<double>(end - begin) / dense_pairs;
    run.realised_head = run.realised_union = run.read_share - dropped;
    if (eviction.limited) run.target_share = static_cast<double>(eviction.target_tokens) / static_cast<double>(cut);
  }
  if (eviction.limited && eviction.target_tokens != eviction.mean_tokens &&
      std::abs(static_cast<double>(eviction.target_tokens - eviction.mean_tokens)) >
          0.01 * static_cast<double>(eviction.mean_tokens))
    run.marks.push_back("own-layer-share");  // a layer allocator gave this layer another target than the table's
  if (collect.rank_normalised()) run.marks.push_back("rank-normalised");
  const Resolved* acting = roles.select ? roles.select : roles.evict;
  if (acting && acting->keeps_dense(l.index)) run.marks.push_back("dense-layer");
  if (l.sliding_window > 0) run.marks.push_back("sliding-window");
  mark_roles(run, roles, phase);
  std::sort(run.marks.begin(), run.marks.end());
  run.marks.erase(std::unique(run.marks.begin(), run.marks.end()), run.marks.end());

  const Cost selection = pipeline.selection_cost();
  run.cost.select_bytes = selection.bytes;
  run.cost.select_flops = selection.flops;
  run.cost.attend_flops = 4.0 * l.head_dim * static_cast<double>(run.work.pairs);
  run.cost.kv_bytes = static_cast<double>(pipeline.cache().kv_bytes());
  run.cost.index_bytes = static_cast<double>(pipeline.cache().side_bytes());
  const double tokens = static_cast<double>(phase == ReplayPhase::prefill ? end : layer.tokens());
  const double pages = std::ceil(tokens / static_cast<double>(pipeline.cache().view().page_size));
  run.cost.dense_kv_bytes = pages * l.num_kv_heads * static_cast<double>(layer.pool().kv_bytes_per_page());
  return run;
}

std::vector<double> mass_of(LayerReplay& layer, PhaseQueries queries, const PhaseRun& run) {
  std::vector<double> mass(run.lse.size(), 1.0);
  if (layer.layer().sliding_window > 0) return mass;
  const std::vector<float> lse = layer.dense_lse(queries.begin, queries.end);
  if (!layer.on_device() || run.other_keys) {
    set_mass(layer.host_attention(queries.begin, queries.end), run.sets, run.q_tile, lse.data(), mass.data());
    return mass;
  }
  // The same keys were read as by dense attention, so that the two sums of exponentials have this ratio.
  const std::vector<float>& read = run.unweighted_lse.empty() ? run.lse : run.unweighted_lse;
  for (std::size_t i = 0; i < mass.size(); ++i)
    mass[i] = std::min(1.0, std::exp(static_cast<double>(read[i]) - static_cast<double>(lse[i])));
  return mass;
}

}  // namespace lacuna
