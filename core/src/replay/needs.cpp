#include "replay/needs.hpp"

#include <algorithm>

#include "lacuna/replay/trace_summary.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// f(strategy) for every strategy of the cell, bases included, until it returns true.
template <class F>
bool any_strategy(const Cell& cell, F f) {
  for (const auto* role : {&cell.select, &cell.evict, &cell.allocate})
    for (const Resolved* r = *role ? &**role : nullptr; r; r = r->base.get())
      if (f(*r)) return true;
  return false;
}

bool has_every_layer(const TraceInfo& info) { return static_cast<int>(info.captured_layers.size()) == info.num_layers; }

std::string missing_of(const Resolved& strategy, const Trace& trace, bool allow_leak) {
  const TraceInfo& info = trace.info();
  const i32 needs = strategy.type->entry().needs;
  if ((needs & (kNeedsAllLayers | kNeedsStatistics)) && !has_every_layer(info))
    return "needs every layer of the model, and the trace has " + std::to_string(info.captured_layers.size()) + " of " +
           std::to_string(info.num_layers);
  if ((needs & kNeedsProjection) && !trace.unchecked_layer(info.captured_layers.front()).wo.present())
    return "needs W_O, which the trace has not";
  if ((needs & kNeedsQuestion) && !info.segment("question")) return "needs a question, which the trace has not";
  if ((needs & kNeedsData) && strategy.data.empty())
    return strategy.type->entry().calibrate
               ? "needs a calibration file: lacuna calibrate " + strategy.type->name() + " --trace FILE --out FILE"
               : "needs a file with its numbers";
  if (strategy.knob && strategy.knob->calibrated_on.empty())
    return "needs traces to set '" + strategy.knob->name + "' on: [calibration] files";
  if (!allow_leak && strategy.knob && names_id(strategy.knob->calibrated_on, trace.content_id()))
    return "refused: calibrated on this very trace (allow_leak = true permits it)";
  for (const auto& [name, file] : strategy.data) {
    for (const int layer : info.captured_layers)
      if ((needs & kNeedsData) && strategy.type->entry().calibrate && !strategy.keeps_dense(layer) &&
          info.layer(layer).sliding_window == 0 && !file->layers.contains(layer))
        return "needs a calibration of layer " + std::to_string(layer) + ", and the file of '" + name + "' has none";
    if (!allow_leak && file->made_from(trace.content_id()))
      return "refused: calibrated on this very trace (allow_leak = true permits it)";
  }
  return "";
}

}  // namespace

bool asks_for(const Cell& cell, i32 needs) {
  return any_strategy(cell, [&](const Resolved& r) { return (r.type->entry().needs & needs) != 0; });
}

std::string missing_need(const Cell& cell, const Trace& trace, bool allow_leak) {
  std::string reason;
  any_strategy(cell, [&](const Resolved& r) {
    reason = missing_of(r, trace, allow_leak);
    if (!reason.empty()) reason = "'" + r.type->name() + "' " + reason;
    return !reason.empty();
  });
  return reason;
}

bool leaks(const Cell& cell, const Trace& trace) {
  return any_strategy(cell, [&](const Resolved& r) {
    return (r.knob && names_id(r.knob->calibrated_on, trace.content_id())) ||
           std::any_of(r.data.begin(), r.data.end(),
                       [&](const auto& named) { return named.second->made_from(trace.content_id()); });
  });
}

std::vector<double> layer_entropy(const Trace& trace, const std::vector<Cell>& cells) {
  std::vector<double> out;
  const bool wanted =
      std::any_of(cells.begin(), cells.end(), [](const Cell& c) { return asks_for(c, kNeedsStatistics); });
  if (!wanted || !has_every_layer(trace.info())) return out;
  for (const int layer : trace.info().captured_layers) out.push_back(summarize_layer(trace, layer).entropy);
  return out;
}

}  // namespace lacuna
