// Rules about what is read and kept: forced units, dense point, nesting.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "replay/conformance_rules.hpp"

namespace lacuna {
using sdk::i32;
using sdk::i64;

namespace {
constexpr double kLseBound = 4e-6, kOutBound = 2e-5;  // of max(1, |lse|), and of sum p |v|
constexpr double kMassSlack = 1e-5;                   // rounding of fp32 logits

/// Slots [begin, end) that the set lacks for the query at slot q; -1: none.
i64 missing(const std::vector<i32>& cells, i64 begin, i64 end) {
  for (i64 s = std::max<i64>(begin, 0); s < end; ++s)
    if (!std::binary_search(cells.begin(), cells.end(), static_cast<i32>(s))) return s;
  return -1;
}

/// First forced slot that query q, at its slot, does not read; -1: none. Units are forced for ranking strategies only.
i64 missing_forced(const sdk::Plan& plan, bool ranks, const RowSet& set, i64 q) {
  const std::vector<i32> cells = set.cells(q, q + 1);
  const i64 unit = plan.unit_tokens;
  std::vector<std::pair<i64, i64>> forced = {{0, std::min<i64>(plan.sinks, q + 1)}, {q + 1 - plan.recent, q + 1}};
  if (ranks) {
    forced.emplace_back(0, std::min<i64>(plan.first_units * unit, q + 1));
    if (plan.last_units > 0) forced.emplace_back((q / unit - plan.last_units + 1) * unit, q + 1);
  }
  for (const auto& [begin, end] : forced)
    if (const i64 s = missing(cells, begin, end); s >= 0) return s;
  return -1;
}

Verdict forced_in(Bench& bench, const Use& use, const Json& budget) {
  const Cell cell = bench.cell(use, budget);
  const sdk::Plan plan = bench.plan(use, cell);
  const Outcome o = bench.run(use, kRegular, cell);
  if (o.failed()) return fail(describe(use, kRegular, budget) + ": " + o.error);
  if (use.role == RoleKind::evict) {
    const i64 n = bench.queries(use, kRegular, cell).begin;
    for (std::size_t h = 0; h < o.eviction.kept.size(); ++h)
      for (const auto& [begin, end] : {std::pair<i64, i64>{0, std::min<i64>(plan.sinks, n)}, {n - plan.recent, n}})
        if (const i64 s = missing(o.eviction.kept[h], begin, end); s >= 0)
          return fail(fmt::format("{}: KV head {} drops the forced token {}", describe(use, kRegular, budget), h, s));
    return {true, ""};
  }
  const bool ranks = !bench.entry().mark && !bench.entry().refine;
  const PhaseQueries queries = bench.queries(use, kRegular, cell);
  const i64 count = queries.end - queries.begin, tiles = (count + o.run.q_tile - 1) / o.run.q_tile;
  for (i64 row = 0; row < static_cast<i64>(o.run.sets.size()); ++row) {
    const i64 begin = row % tiles * o.run.q_tile, end = std::min(begin + o.run.q_tile, count);
    for (const i64 i : {begin, end - 1})
      if (const i64 s = missing_forced(plan, ranks, o.run.sets[static_cast<std::size_t>(row)], queries.begin + i);
          s >= 0)
        return fail(fmt::format("{}: head {} does not read the forced token {} for the query at {}",
                                describe(use, kRegular, budget), row / tiles, s, queries.begin + i));
  }
  return {true, ""};
}

/// "" or where the run leaves the fp64 oracle.
std::string off_dense(LayerReplay& layer, PhaseQueries q, const PhaseRun& run) {
  const i64 d = layer.layer().head_dim;
  std::vector<double> out(run.out.size()), lse(run.lse.size()), scale(run.lse.size());
  attend_fp64(layer.host_attention(q.begin, q.end), out.data(), lse.data(), scale.data());
  for (std::size_t r = 0; r < lse.size(); ++r) {
    double square = 0;
    for (i64 c = 0; c < d; ++c) {
      const std::size_t at = r * static_cast<std::size_t>(d) + static_cast<std::size_t>(c);
      square += (run.out[at] - out[at]) * (run.out[at] - out[at]);
    }
    const double off_lse = std::abs(run.lse[r] - lse[r]) / std::max(1.0, std::abs(lse[r])),
                 off_out = std::sqrt(square) / scale[r];
    if (off_lse <= kLseBound && off_out <= kOutBound) continue;
    return fmt::format("query {} of head {}: lse off by {:.2e} of max(1, |lse|), output by {:.2e} of sum p |v|",
                       r % (lse.size() / static_cast<std::size_t>(layer.layer().num_qo_heads)),
                       r / (lse.size() / static_cast<std::size_t>(layer.layer().num_qo_heads)), off_lse, off_out);
  }
  return "";
}

/// "" or where `small` reads what `large` does not, or where `large` holds less mass.
std::string not_nested(Bench& bench, const Use& use, const Cell& cell, const Outcome& small, const Outcome& large) {
  for (std::size_t h = 0; h < small.eviction.kept.size(); ++h) {
    const auto &a = small.eviction.kept[h], &b = large.eviction.kept[h];
    if (!std::includes(b.begin(), b.end(), a.begin(), a.end()))
      return fmt::format("KV head {} keeps what it drops with a larger budget", h);
  }
  const PhaseQueries q = bench.queries(use, kRegular, cell);
  const i64 count = q.end - q.begin, tile = small.run.q_tile, tiles = (count + tile - 1) / tile;
  for (std::size_t r = 0; r < small.run.sets.size(); ++r)
    for (const i64 i :
         {static_cast<i64>(r) % tiles * tile, std::min((static_cast<i64>(r) % tiles + 1) * tile, count) - 1}) {
      const auto a = small.run.sets[r].cells(q.begin + i, q.begin + i + 1),
                 b = large.run.sets[r].cells(q.begin + i, q.begin + i + 1);
      if (!std::includes(b.begin(), b.end(), a.begin(), a.end()))
        return fmt::format("head {} reads for the query at {} what it does not with a larger budget",
                           static_cast<i64>(r) / tiles, q.begin + i);
    }
  LayerReplay& layer = bench.layer(kRegular, true);
  const std::vector<double> less = mass_of(layer, q, small.run), more = mass_of(layer, q, large.run);
  for (std::size_t i = 0; i < less.size(); ++i)
    if (more[i] < less[i] - kMassSlack)
      return fmt::format("mass {} falls to {} with a larger budget", less[i], more[i]);
  return "";
}
}  // namespace

Verdict rule_forced_units(Bench& bench) {
  int uses = 0;
  for (const Use& use : bench.uses()) {
    // An allocator's rules may take a row out of the ranking, and what retain() keeps is its own affair.
    if (use.role == RoleKind::allocate ||
        (use.role == RoleKind::evict && (bench.entry().retain || use.phase == ReplayPhase::decode)))
      continue;
    ++uses;
    for (const double density : {0.1, 0.3}) {
      const Json budget = bench.entry().takes_budget ? Json{{"density", density}} : Json::object();
      const Verdict v = forced_in(bench, use, budget);
      if (!v.passed) return v;
    }
  }
  return uses > 0 ? Verdict{true, "what plan() forces is read and kept"}
                  : not_applicable("nothing is forced in what it does");
}

Verdict rule_dense_point(Bench& bench) {
  const std::string text = bench.entry().dense_point;
  if (text.empty()) return not_applicable("it declares none");
  const Json settings = Json::parse(text);
  for (const Use& use : bench.uses())
    for (const Shape& shape : {kRegular, kAwkward[1], kAwkward[4]}) {
      const Cell cell = bench.cell(use, settings);
      const Outcome o = bench.run(use, shape, cell);
      if (o.failed()) return fail(describe(use, shape, settings) + ": " + o.error);
      if (o.run.work.sparse_rows == 0)
        return fail(describe(use, shape, settings) + ": nothing went through the sparse path");
      const std::string off = off_dense(bench.layer(shape, true), bench.queries(use, shape, cell), o.run);
      if (!off.empty()) return fail(describe(use, shape, settings) + " is not dense: " + off);
    }
  return {true, "equals the fp64 oracle at " + text};
}

Verdict rule_nested(Bench& bench) {
  if (!bench.entry().nested) return not_applicable("it does not declare nested");
  if (!bench.entry().takes_budget) return not_applicable("it takes no budget");
  for (const Use& use : bench.uses()) {
    if (use.role == RoleKind::evict && use.phase == ReplayPhase::decode) continue;  // each budget sees its own past
    const RoleKind served = use.phase == ReplayPhase::evict ? RoleKind::evict : RoleKind::select;
    if (use.role == RoleKind::allocate && !bench.scorer(served, use.phase)->entry().nested) continue;
    Outcome small;
    for (const double density : {0.1, 0.2, 0.4}) {
      const Json budget = {{"density", density}};
      const Cell cell = bench.cell(use, budget);
      Outcome large = bench.run(use, kRegular, cell);
      if (large.failed()) return fail(describe(use, kRegular, budget) + ": " + large.error);
      const std::string what = small.run.lse.empty() ? "" : not_nested(bench, use, cell, small, large);
      if (!what.empty()) return fail(describe(use, kRegular, budget) + ": " + what);
      small = std::move(large);
    }
  }
  return {true, "a larger budget reads a superset, and no less mass"};
}

}  // namespace lacuna
