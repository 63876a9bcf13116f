#include "lacuna/replay/calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/replay.hpp"
#include "replay/phase_run.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// What one layer's traces add up to, and the arrays that come of it.
class Collected final : public Calibration {
 public:
  double* sums(const char* name, i64 n) noexcept override {
    auto& of_name = sums_[name];
    of_name.resize(static_cast<std::size_t>(n));
    return of_name.data();
  }
  void put(const char* name, const float* values, i32 rank, const i64* extent) noexcept override {
    CalibrationArray& array = arrays[name];
    array.shape.assign(extent, extent + rank);
    i64 n = 1;
    for (const i64 e : array.shape) n *= e;
    array.values.assign(values, values + n);
  }

  std::map<std::string, CalibrationArray> arrays;

 private:
  std::map<std::string, std::vector<double>> sums_;
};

void check_alike(const std::vector<Trace>& traces) {
  if (traces.empty()) throw lacuna::Error(Problem{"nothing to calibrate on", "at least one trace", "none", "", ""});
  const TraceInfo& first = traces.front().info();
  for (const Trace& trace : traces) {
    const TraceInfo& info = trace.info();
    if (info.num_layers != first.num_layers || info.num_qo_heads != first.num_qo_heads ||
        info.num_kv_heads != first.num_kv_heads || info.head_dim != first.head_dim)
      throw lacuna::Error(Problem{"calibration traces of different models", first.model, info.model, info.path,
                                  "calibrate each model by itself"});
  }
}

template <class F>
std::string joined(const std::vector<Trace>& traces, F text_of) {
  std::string out;
  for (const Trace& trace : traces) out += (out.empty() ? "" : ",") + text_of(trace);
  return out;
}

/// Layers that every trace has.
std::vector<int> common_layers(const std::vector<Trace>& traces) {
  std::vector<int> out;
  for (const int layer : traces.front().info().captured_layers)
    if (std::all_of(traces.begin(), traces.end(), [&](const Trace& t) {
          const auto& captured = t.info().captured_layers;
          return std::find(captured.begin(), captured.end(), layer) != captured.end();
        }))
      out.push_back(layer);
  return out;
}

constexpr i32 kPageSize = 16;

}  // namespace

std::string data_parameter(const StrategyType& type) {
  for (const ParamSpec& p : type.params())
    if (p.type == "data") return p.name;
  return "";
}

CalibrationFile calibrate(const Resolved& strategy, const std::vector<Trace>& traces) {
  const StrategyType& type = *strategy.type;
  if (!type.entry().calibrate)
    throw lacuna::Error(Problem{"strategy '" + type.name() + "' does not calibrate", "a strategy with role calibrate",
                                "none", "", "see lacuna describe " + type.name()});
  check_alike(traces);
  CalibrationFile file;
  for (const int layer : common_layers(traces)) {
    Collected collected;
    collected.traces = static_cast<i32>(traces.size());
    for (const Trace& trace : traces) {
      LayerReplay replayed(trace, layer, kPageSize, false);
      const LayerSetup setup = replayed.setup(0, false);
      StrategyRuntime runtime(strategy, type.can_evict() ? Purpose::evict : Purpose::select, setup, "calibrate");
      KvCache cache = replayed.fork(trace.info().tokens());
      runtime.calibrate(cache, {Phase::prefill, -1, 0, trace.info().tokens()}, collected);
      ++collected.trace;
    }
    if (!collected.arrays.empty()) file.layers[layer] = std::move(collected.arrays);
  }
  file.metadata["strategy"] = type.name();
  file.metadata["strategy_id"] = type.id();
  file.metadata["parameters"] = strategy.describe().dump();
  file.metadata["model"] = traces.front().info().model;
  file.metadata["trace_ids"] = joined(traces, [](const Trace& t) { return t.content_id(); });
  file.metadata["traces"] =
      joined(traces, [](const Trace& t) { return std::filesystem::path(t.info().path).filename().string(); });
  file.identify();
  return file;
}

namespace {

/// The cell's select strategy with its knob turned to x.
Cell turned(const Cell& cell, double x) {
  Cell out = cell;
  Json& value = out.select->own[out.select->knob->name];
  value = value.is_number_integer() ? Json(static_cast<std::int64_t>(std::llround(x))) : Json(x);
  return out;
}

/// Layers of the calibration traces, ready to be replayed again and again.
class KnobBench {
 public:
  KnobBench(const Cell& cell, const std::vector<Trace>& traces) {
    phase_ = cell.select->type->in_phase(kPrefill) ? ReplayPhase::prefill : ReplayPhase::decode;
    for (const Trace& trace : traces)
      for (const int layer : trace.info().captured_layers) {
        if (cell.select->keeps_dense(layer) || trace.info().layer(layer).sliding_window > 0) continue;
        layers_.push_back({&trace.info(), std::make_unique<LayerReplay>(trace, layer, kPageSize, false)});
      }
    if (layers_.empty())
      throw lacuna::Error(
          Problem{"no layer to calibrate on", "a layer that the strategy leaves sparse", "none", "", ""});
  }

  double realised(const Cell& cell) {
    double sum = 0;
    for (auto& [info, layer] : layers_)
      sum += run_phase(*layer, *info, cell, phase_, phase_queries(*info, phase_, ""), {}).realised_head;
    return sum / static_cast<double>(layers_.size());
  }

 private:
  ReplayPhase phase_;
  std::vector<std::pair<const TraceInfo*, std::unique_ptr<LayerReplay>>> layers_;
};

}  // namespace

KnobValue calibrate_knob(const Cell& cell, const std::vector<Trace>& traces) {
  if (!cell.select || !cell.select->knob)
    throw lacuna::Error(
        Problem{"nothing to bisect", "a select strategy with a budget knob and calibrate = true", "none", "", ""});
  check_alike(traces);
  const Resolved& strategy = *cell.select;
  const BudgetKnob& knob = *strategy.knob;
  KnobBench bench(cell, traces);
  const auto at = [&](double x) { return bench.realised(turned(cell, x)); };
  double lo = knob.lo, hi = knob.hi, at_lo = at(lo), at_hi = at(hi);
  if (at_lo == at_hi)
    throw lacuna::Error(Problem{fmt::format("the knob '{}' of '{}' moves nothing", knob.name, strategy.type->name()),
                                "different densities at its ends", fmt::format("{} at both", at_lo), "", ""});
  const bool rising = at_hi > at_lo;
  const auto better = [&](KnobValue a, KnobValue b) {
    return std::abs(a.realised - knob.density) <= std::abs(b.realised - knob.density) ? a : b;
  };
  KnobValue best = better({lo, at_lo}, {hi, at_hi});
  constexpr int kHalvings = 24;
  constexpr double kClose = 1e-3;  // of the density: more digits of the knob say nothing
  for (int i = 0; i < kHalvings && std::abs(best.realised - knob.density) > kClose * knob.density; ++i) {
    const double mid = knob.whole ? std::floor((lo + hi) / 2) : (lo + hi) / 2;
    if (knob.whole && (mid == lo || mid == hi)) break;
    const double there = at(mid);
    best = better(best, {mid, there});
    ((there < knob.density) == rising ? lo : hi) = mid;
  }
  return best;
}

namespace {

void fill_data(std::vector<Cell>& cells, const std::vector<Trace>& traces) {
  std::map<std::string, std::shared_ptr<const CalibrationFile>> known;
  const auto fill = [&](Resolved& strategy) {
    const sdk::Entry& entry = strategy.type->entry();
    if (!(entry.needs & kNeedsData) || !entry.calibrate || !strategy.data.empty()) return;
    auto& file = known[strategy.type->name() + strategy.own.dump()];
    if (!file) file = std::make_shared<CalibrationFile>(calibrate(strategy, traces));
    strategy.data[data_parameter(*strategy.type)] = file;
  };
  for (Cell& cell : cells)
    for (auto* role : {&cell.select, &cell.evict, &cell.allocate})
      for (Resolved* r = *role ? &**role : nullptr; r;) {
        fill(*r);
        if (r->base) r->base = std::make_shared<Resolved>(*r->base);  // bases are shared between cells
        r = r->base.get();
      }
}

}  // namespace

void calibrate_cells(std::vector<Cell>& cells, const std::vector<Trace>& traces) {
  fill_data(cells, traces);
  std::map<std::string, KnobValue> known;
  const std::string ids = joined(traces, [](const Trace& t) { return t.content_id(); });
  for (Cell& cell : cells) {
    if (!cell.select || !cell.select->knob) continue;
    Cell alone;  // another seed or another evict role does not turn the knob
    alone.select = cell.select;
    const std::string key = alone.describe().dump();
    auto found = known.find(key);
    if (found == known.end()) found = known.emplace(key, calibrate_knob(alone, traces)).first;
    const Cell set = turned(cell, found->second.value);
    cell.select->own = set.select->own;
    cell.select->knob->calibrated_on = ids;
  }
}

}  // namespace lacuna
