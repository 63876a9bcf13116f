#include "report/shares.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "lacuna/pipeline/budget.hpp"

namespace lacuna {
namespace {

bool is_sparse(const Row& row) { return !row.marked("dense-layer") && !row.marked("sliding-window"); }

/// A share of each layer, over its seeds and traces by their weights.
class LayerShares {
 public:
  void add(int layer, double weight, double share) {
    Sums& s = layers_[layer];
    s.weight += weight;
    s.sum += weight * share;
  }
  bool empty() const { return layers_.empty(); }
  /// Layers count the same: in a model, all of one kind have equal pairs, whichever of them were captured how often.
  double mean() const {
    double sum = 0;
    for (const auto& [layer, s] : layers_) sum += s.sum / s.weight;
    return sum / static_cast<double>(layers_.size());
  }

 private:
  struct Sums {
    double weight = 0, sum = 0;
  };
  std::map<int, Sums> layers_;
};

const TraceFacts* facts_of(const StudyResult& study, const Row& row) {
  const auto found =
      std::find_if(study.traces.begin(), study.traces.end(), [&](const TraceFacts& t) { return t.id == row.trace_id; });
  return found == study.traces.end() ? nullptr : &*found;
}

/// Pairs of the row's queries with keys at most `window` back, per query head.
double pairs_of(const Row& row, const TraceFacts& trace, std::int64_t window) {
  const std::int64_t prompt = trace.prefill_tokens, end = prompt + trace.decode_tokens;
  switch (row.phase) {
    case ReplayPhase::prefill: return static_cast<double>(capped_pairs(window, 0, prompt));
    case ReplayPhase::evict: return static_cast<double>(capped_pairs(window, row.cut, end));
    case ReplayPhase::decode: break;
  }
  return static_cast<double>(capped_pairs(window, prompt, end));
}

/// What the realised share is a share of: pairs, or the tokens before the cut.
double whole_of(const Row& row, const TraceFacts& trace, std::int64_t window) {
  return row.phase == ReplayPhase::evict ? static_cast<double>(std::min(window, row.cut))
                                         : pairs_of(row, trace, window);
}

constexpr std::int64_t kNoWindow = std::int64_t{1} << 40;

/// A model's layers by kind, as its traces tell.
struct Kinds {
  bool known = false;
  double full = 0, windowed = 0, dense = 0;  // numbers of layers; dense: of the full ones
  std::vector<std::int64_t> windows;         // of the captured layers
};

Kinds kinds_of(const std::vector<const TraceFacts*>& traces, const Resolved* role) {
  std::set<int> captured;
  std::map<int, std::int64_t> windows;
  bool mixed = false;
  for (const TraceFacts* t : traces) {
    captured.insert(t->captured_layers.begin(), t->captured_layers.end());
    windows.insert(t->sliding_window.begin(), t->sliding_window.end());
    mixed |= t->mixed_layers;
  }
  Kinds out;
  if (captured.empty() || (mixed && (windows.empty() || windows.size() == captured.size()))) return out;
  const double layers = traces.front()->num_layers;
  out.known = true;
  out.windowed = layers * static_cast<double>(windows.size()) / static_cast<double>(captured.size());
  out.full = layers - out.windowed;
  if (role)
    for (const int layer : role->dense_layers()) out.dense += layer < layers && windows.count(layer) == 0;
  out.dense = std::min(out.dense, out.full);
  for (const auto& [layer, window] : windows) out.windows.push_back(window);
  return out;
}

}  // namespace

void fill_shares(const StudyResult& study, const MethodRows& method, Line& line) {
  LayerShares head, shared, target, read;
  std::map<std::string, const Row*> row_of_trace;
  std::vector<const TraceFacts*> traces;
  for (const Row* row : method.rows) {
    const TraceFacts* trace = facts_of(study, *row);
    if (!trace) continue;
    if (row_of_trace.emplace(row->trace_id, row).second) traces.push_back(trace);
    read.add(row->layer, pairs_of(*row, *trace, kNoWindow), row->read_share);
    if (!is_sparse(*row)) continue;
    const double whole = whole_of(*row, *trace, kNoWindow);
    head.add(row->layer, whole, row->realised_head);
    shared.add(row->layer, whole, row->realised_union);
    if (row->target_share > 0) target.add(row->layer, whole, row->target_share);
  }
  if (!read.empty()) line.read_share = read.mean();
  if (!target.empty()) line.target = target.mean();
  if (!head.empty()) {
    line.realised_head = head.mean();
    line.realised_union = shared.mean();
  }
  const Row& first = *method.rows.front();
  const Cell& cell = study.scenario.cells[static_cast<std::size_t>(first.cell)];
  line.selects = cell.select.has_value();
  if (traces.empty()) return;

  const Kinds kinds = kinds_of(traces, budget_role(cell, first.phase));
  if (!kinds.known) return;
  double whole = 0, in_windows = 0;  // of a layer, over the traces
  for (const TraceFacts* trace : traces) {
    const Row& row = *row_of_trace.at(trace->id);
    whole += whole_of(row, *trace, kNoWindow);
    for (const std::int64_t window : kinds.windows)
      in_windows += whole_of(row, *trace, window) / static_cast<double>(kinds.windows.size());
  }
  const double always = kinds.dense * whole + kinds.windowed * in_windows, sparse = (kinds.full - kinds.dense) * whole;
  line.realised_head_all = (sparse * line.realised_head + always) / (sparse + always);
  line.realised_union_all = (sparse * line.realised_union + always) / (sparse + always);
}

}  // namespace lacuna
