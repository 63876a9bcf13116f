// Rules about what outlives a call: side data, and what allocators hand out.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "replay/conformance_rules.hpp"

namespace lacuna {
using sdk::i32;
using sdk::i64;

namespace {
/// A cache without sides that holds exactly what `other` holds of the first `tokens` tokens.
KvCache rebuilt(LayerReplay& layer, const KvCache& other, i64 tokens) {
  KvCache cache = layer.fork(tokens);
  std::vector<std::vector<i32>> kept;
  for (i32 h = 0; h < layer.layer().num_kv_heads; ++h) kept.push_back(other.positions(h));
  cache.retain(kept);
  return cache;
}

/// Selection: decode steps of one pipeline, each held against a fresh pipeline on the same tokens; `evict` (or null)
/// lets tokens go between them.
std::string stale_selection(Bench& bench, const Use& use, const Cell& cell, const Resolved* evict) {
  LayerReplay& layer = bench.layer(kRegular, true);
  const LayerSetup setup = layer.setup(0, true);
  const i64 prompt = kRegular.prefill_tokens;
  const Roles roles{&*cell.select, evict, nullptr};
  LayerPipeline driven(roles, setup, layer.fork(prompt), {true});
  if (evict) {
    const std::vector<float> out = layer.dense_out(0, prompt), lse = layer.dense_lse(0, prompt);
    driven.observe_prefill(out, lse);
    driven.evict_at_cut();
  }
  for (i64 i = 0; i < kRegular.decode_tokens; ++i) {
    LayerPipeline fresh({&*cell.select, nullptr, nullptr}, setup, rebuilt(layer, driven.cache(), prompt + i), {true});
    const Step a = driven.step(prompt + i, i), b = fresh.step(prompt + i, i);
    for (std::size_t h = 0; h < a.choice.sets.size(); ++h)
      if (a.choice.sets[h].slots != b.choice.sets[h].slots ||
          a.choice.sets[h].log_weight != b.choice.sets[h].log_weight)
        return fmt::format("{}: {}step {}, head {}: sides built from scratch choose otherwise",
                           describe(use, kRegular, {}), evict ? "after evictions, " : "", i, h);
  }
  return "";
}

/// Eviction: a cut at half of the prompt and one at its end, the second against a fresh pipeline on the same tokens.
std::string stale_eviction(Bench& bench, const Use& use, const Cell& cell) {
  LayerReplay& layer = bench.layer(kRegular, true);
  const LayerSetup setup = layer.setup(0, true);
  const i64 prompt = kRegular.prefill_tokens, half = prompt / 2;
  const Roles roles{nullptr, &*cell.evict, nullptr};
  LayerPipeline driven(roles, setup, layer.fork(half), {true});
  driven.evict_at_cut();
  driven.append(half, prompt - half);
  LayerPipeline fresh(roles, setup, rebuilt(layer, driven.cache(), prompt), {true});
  return driven.evict_at_cut().kept == fresh.evict_at_cut().kept
             ? ""
             : describe(use, kRegular, {}) + ": sides built from scratch keep other tokens";
}

/// Per head as many tokens as the cut's targets add up to, a token a head aside; "" where it does not apply.
std::string off_target(const Outcome& o, int heads) {
  const double target = static_cast<double>(o.eviction.target_tokens) * heads;
  if (std::abs(o.eviction.kept_tokens - target) <= heads) return "";
  return fmt::format("the layer keeps {} tokens of a target of {}", o.eviction.kept_tokens, target);
}
}  // namespace

Verdict rule_side_data(Bench& bench) {
  if (!bench.entry().index) return not_applicable("it keeps no side data");
  const Json budget = bench.entry().takes_budget ? Json{{"density", 0.3}} : Json::object();
  for (const Use& use : bench.uses()) {
    if (use.role == RoleKind::allocate || use.phase == ReplayPhase::prefill) continue;
    const Cell cell = bench.calibrated(bench.cell(use, budget), kRegular);
    std::string what;
    if (use.role == RoleKind::select) {
      what = stale_selection(bench, use, cell, nullptr);
      // A state fixed over the whole prompt is not that of a prompt with holes: then only appends can be compared.
      if (bench.plan(use, cell).num_states == 0)
        for (const Resolved& evict : bench.evictors())
          if (what.empty()) what = stale_selection(bench, use, cell, &evict);
    } else if (use.phase == ReplayPhase::evict && !bench.entry().attended) {
      what = stale_eviction(bench, use, cell);
    }
    if (!what.empty()) return fail(what);
  }
  return {true, "sides kept up to date choose as sides built from scratch"};
}

Verdict rule_allocation(Bench& bench) {
  if (!bench.type().can_allocate()) return not_applicable("it allocates nothing");
  if (!bench.entry().takes_budget) return not_applicable("its rules stand instead of a budget");
  constexpr double kShare = 0.01;
  for (const Use& use : bench.uses()) {
    if (use.role != RoleKind::allocate || use.phase != ReplayPhase::evict)
      continue;  // elsewhere the rule `budget` sees to it
    for (const double density : {0.2, 0.5, 0.8}) {
      const Json budget = {{"density", density}};
      const Outcome o = bench.run(use, kRegular, bench.cell(use, budget));
      if (o.failed()) return fail(describe(use, kRegular, budget) + ": " + o.error);
      const double mean = o.eviction.allocated_mean, target = static_cast<double>(o.eviction.mean_tokens);
      if (std::abs(mean - target) > kShare * target)
        return fail(fmt::format("{}: the layers' mean is {} tokens of a target of {}", describe(use, kRegular, budget),
                                mean, target));
      const std::string off = o.eviction.floor ? "" : off_target(o, kRegular.num_kv_heads);
      if (!off.empty()) return fail(describe(use, kRegular, budget) + ": " + off);
    }
  }
  return {true, "layers within 1 %, rows within a token each"};
}

}  // namespace lacuna
