#include "replay/conformance_bench.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/calibrate.hpp"
#include "lacuna/replay/replay.hpp"

namespace lacuna {

namespace {
constexpr int kLayers = 4, kLayer = 2;  // the model's, and the one that is looked at
constexpr double kLooseDensity = 0.5;   // of a wrapper's base
constexpr double kDensity = 0.3;        // of a companion where the rule asks for none

sdk::Phases phase_bit(ReplayPhase phase) {
  return phase == ReplayPhase::prefill ? sdk::kPrefill : phase == ReplayPhase::decode ? sdk::kDecode : sdk::kEvict;
}

bool has_parameter(const StrategyType& type, RoleKind role, const std::string& name) {
  const auto params = type.params(role);
  return std::any_of(params.begin(), params.end(), [&](const ParamSpec& p) { return p.name == name; });
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

std::vector<Use> uses_of(const StrategyType& type) {
  std::vector<Use> out;
  for (const ReplayPhase phase : {ReplayPhase::prefill, ReplayPhase::decode})
    if (type.can_select() && type.in_phase(phase_bit(phase))) out.push_back({RoleKind::select, phase});
  if (type.can_evict()) {
    out.push_back({RoleKind::evict, ReplayPhase::evict});
    if (type.entry().attended) out.push_back({RoleKind::evict, ReplayPhase::decode});
  }
  if (!type.can_allocate()) return out;
  for (const ReplayPhase phase : {ReplayPhase::prefill, ReplayPhase::decode, ReplayPhase::evict})
    if (type.in_phase(phase_bit(phase))) out.push_back({RoleKind::allocate, phase});
  return out;
}
}  // namespace

Bench::Bench(const Registry& registry, const StrategyType& type, std::shared_ptr<Device> device)
    : registry_(registry), type_(type), device_(std::move(device)) {
  for (const Use& use : uses_of(type)) {
    const bool wants_company = use.role == RoleKind::allocate || entry().wrapper;
    const RoleKind company = use.role != RoleKind::allocate    ? use.role
                             : use.phase == ReplayPhase::evict ? RoleKind::evict
                                                               : RoleKind::select;
    if (!wants_company || scorer(company, use.phase)) uses_.push_back(use);
  }
}

std::vector<Json> Bench::budgets(const Use& use) const {
  if (!entry().takes_budget) return {Json::object()};
  std::vector<Json> out;
  for (const double density : {0.1, kDensity, 0.8}) out.push_back({{"density", density}});
  if (use.role == RoleKind::allocate) return out;
  out.push_back({{"tokens", 24}});
  out.push_back({{"units", 3}});
  out.push_back(Json::object());
  return out;
}

const StrategyType* Bench::scorer(RoleKind role, ReplayPhase phase) const {
  const StrategyType* best = nullptr;
  for (const StrategyType* t : registry_.all()) {
    const auto& e = t->entry();
    const bool fits = t != &type_ && t->can(role) && t->in_phase(phase_bit(phase)) && e.score && e.takes_budget &&
                      !e.wrapper && !e.clairvoyant && !e.stochastic;
    if (!fits) continue;
    if (!best || t->name() == (role == RoleKind::evict ? "snapkv" : "quest")) best = t;
  }
  return best;
}

Json Bench::companion(RoleKind role, ReplayPhase phase, const Json& budget) const {
  const StrategyType* type = scorer(role, phase);
  if (!type)
    throw Error({"no strategy stands beside '" + type_.name() + "'", "one that ranks and takes a budget", "none",
                 "conformance", "load the built-in strategies"});
  Json out = {{"name", type->name()}};
  out.update(budget);
  return out;
}

Cell Bench::cell(const Use& use, const Json& settings) const {
  Json own = {{"name", type_.name()}}, budget = Json::object();
  for (const auto& item : settings.items()) (is_budget_key(item.key()) ? budget : own)[item.key()] = item.value();
  const auto no_dense_layers = [](const StrategyType& type, RoleKind role, Json& table) {
    if (has_parameter(type, role, "dense_layers") && !table.contains("dense_layers"))
      table["dense_layers"] = Json::array();
  };
  no_dense_layers(type_, use.role, own);
  if (entry().wrapper && !own.contains("base"))
    own["base"] = companion(use.role, use.phase, {{"density", kLooseDensity}});
  Cell out;
  out.label = type_.name();
  const auto made = [&](const Json& table, RoleKind role) {
    return resolve(registry_, table, "conformance", "", role);
  };
  if (use.role != RoleKind::allocate) {
    own.update(budget);
    (use.role == RoleKind::select ? out.select : out.evict) = made(own, use.role);
    return out;
  }
  if (budget.empty()) budget["density"] = kDensity;
  const RoleKind served = use.phase == ReplayPhase::evict ? RoleKind::evict : RoleKind::select;
  Json beside = companion(served, use.phase, budget);
  no_dense_layers(registry_.find(beside["name"].get<std::string>()), served, beside);
  (served == RoleKind::select ? out.select : out.evict) = made(beside, served);
  out.allocate = made(own, RoleKind::allocate);
  return out;
}

Cell Bench::calibrated(Cell cell, const Shape& shape) {
  if (!entry().calibrate || !(entry().needs & sdk::kNeedsData)) return cell;
  for (std::optional<Resolved>* role : {&cell.select, &cell.evict, &cell.allocate}) {
    if (!*role || (*role)->type != &type_) continue;
    auto& file = calibrations_[shape];
    if (!file) {
      std::vector<Trace> traces;
      traces.push_back(generated(shape));
      file = std::make_shared<CalibrationFile>(calibrate(**role, traces));
    }
    (*role)->data[data_parameter(type_)] = file;
  }
  return cell;
}

const Trace& Bench::trace(const Shape& shape) {
  const auto found = traces_.find(shape);
  return found != traces_.end() ? found->second : traces_.emplace(shape, generated(shape)).first->second;
}

Trace Bench::generated(const Shape& shape) const {
  SyntheticSpec spec;
  spec.num_qo_heads = shape.num_qo_heads;
  spec.num_kv_heads = shape.num_kv_heads;
  spec.head_dim = shape.head_dim;
  spec.prefill_tokens = shape.prefill_tokens;
  spec.decode_tokens = shape.decode_tokens;
  spec.num_layers = kLayers;
  spec.captured_layers = {kLayer};
  spec.with_wo = entry().needs & sdk::kNeedsProjection;
  return synthetic_trace(spec);
}

LayerReplay& Bench::layer(const Shape& shape, bool poison) {
  constexpr sdk::i32 kPage = 16;
  auto& layer = layers_[{shape, poison}];
  if (!layer) layer = std::make_unique<LayerReplay>(trace(shape), kLayer, kPage, poison, device_);
  return *layer;
}

sdk::Plan Bench::plan(const Use& use, const Cell& cell) {
  LayerReplay& on = layer(kRegular, true);
  const LayerSetup setup = on.setup(0, true);
  const bool select = use.role == RoleKind::select, decode = select && use.phase == ReplayPhase::decode;
  KvCache cache = on.fork(on.tokens());
  StrategyRuntime runtime(select ? *cell.select : *cell.evict, select ? sdk::Purpose::select : sdk::Purpose::evict,
                          setup, verb(use.role));
  runtime.prepare(cache, {decode ? sdk::Phase::decode : sdk::Phase::prefill, decode ? 0 : -1, 0, on.tokens()}, -1);
  return runtime.plan();
}

std::vector<Resolved> Bench::evictors() const {
  std::vector<const StrategyType*> types = {scorer(RoleKind::evict, ReplayPhase::evict)};
  for (const StrategyType* t : registry_.all())
    if (t->can_evict() && t->entry().attended && t->entry().takes_budget) types.push_back(t);
  std::vector<Resolved> out;
  for (const StrategyType* t : types)
    if (t)
      out.push_back(
          resolve(registry_, {{"name", t->name()}, {"density", kLooseDensity}}, "conformance", "", RoleKind::evict));
  return out;
}

PhaseQueries Bench::queries(const Use& use, const Shape& shape, const Cell& cell) {
  return phase_queries(info(shape), use.phase, cut_parameter(cell));
}

Outcome Bench::run(const Use& use, const Shape& shape, const Cell& cell, bool poison) {
  Outcome out;
  LayerReplay& on = layer(shape, poison);
  try {
    const auto keep = [&](const Eviction& e) { out.eviction = e; };
    CarriedArrays carried;
    const std::vector<double> entropy(kLayers, 1.0);
    out.run = run_phase(on, info(shape), calibrated(cell, shape), use.phase, queries(use, shape, cell),
                        {poison, false, false, {}, keep, &carried, entropy.data()});
  } catch (const std::exception& e) {
    out.error = e.what();
  }
  return out;
}

std::string describe(const Use& use, const Shape& s, const Json& settings) {
  std::string text =
      fmt::format("{} in {} ({} heads, {} KV heads, d {}, {} + {} tokens)", verb(use.role), name_of(use.phase),
                  s.num_qo_heads, s.num_kv_heads, s.head_dim, s.prefill_tokens, s.decode_tokens);
  if (!settings.empty()) text += " with " + settings.dump();
  return text;
}

std::string difference(const Outcome& a, const Outcome& b) {
  if (a.failed() || b.failed()) return a.error == b.error ? "" : "one run failed: " + (a.failed() ? a.error : b.error);
  for (std::size_t h = 0; h < std::max(a.eviction.kept.size(), b.eviction.kept.size()); ++h)
    if (h >= a.eviction.kept.size() || h >= b.eviction.kept.size() || a.eviction.kept[h] != b.eviction.kept[h])
      return fmt::format("KV head {} keeps other tokens", h);
  if (a.run.sets.size() != b.run.sets.size()) return "another number of rows";
  for (std::size_t r = 0; r < a.run.sets.size(); ++r) {
    const RowSet &x = a.run.sets[r], &y = b.run.sets[r];
    if (x.slots != y.slots || x.exact_sinks != y.exact_sinks || x.exact_window != y.exact_window)
      return fmt::format("row {} reads other tokens", r);
    if (!same_bits(x.log_weight, y.log_weight)) return fmt::format("row {} has other log weights", r);
  }
  if (!same_bits(a.run.lse, b.run.lse)) return "other bits in lse";
  return same_bits(a.run.out, b.run.out) ? "" : "other bits in the output";
}

}  // namespace lacuna
