// Replays a trace's attention under every cell of a study, a layer at a time, and compares it with dense attention.
#pragma once

#include <functional>
#include <set>

#include "lacuna/replay/row.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

struct ReplayOptions {
  std::set<ReplayPhase> phases;
  bool check = false;  // poison what a strategy may not read (its contract is always checked)
  sdk::i32 page_size = 16;
  std::shared_ptr<Device> device = cpu_device();  // where caches live and strategies run
  std::optional<std::int64_t>
      min_context;  // visible tokens that a compared prefill query needs; default min(32 / density, half the prompt)
  double default_density = 1;  // for the default of min_context where a method has no density: the study's smallest
  bool allow_leak = false;  // replay strategies on traces that they were calibrated on (their rows are marked "leak")
  std::function<void(const Row&)> on_row;  // progress: called once per finished row
  std::function<bool()> stop;              // asked between cells; true ends the replay early
};

/// A cell that has nothing to do in a phase, and why.
struct Skip {
  int cell;
  ReplayPhase phase;
  std::string reason;
};

struct ReplayResult {
  std::vector<Row> rows;    // by layer, phase, cell
  std::vector<Skip> skips;  // per (cell, phase), the same for every layer
};

/// Throws Error when a cell does not fit the trace's model (dense_layers that it has not).
void check_cell(const Cell& cell, const TraceInfo& info);

/// A strategy that fails makes its own row "failed"; the others go on. Throws Error for a bad trace or layer.
ReplayResult replay(const Trace& trace, const std::vector<Cell>& cells, const ReplayOptions& options);

/// The cell's cut as text: "end", "before_question" or a number.
std::string cut_parameter(const Cell& cell);

/// The token that a cut parameter means: "before_question", "end" (of the prompt) or a number. Throws Error when the
/// trace has no question or the number is not inside the prompt.
std::int64_t cut_of(const TraceInfo& info, const std::string& cut);

/// The default of ReplayOptions::min_context at a density.
std::int64_t default_min_context(double density, std::int64_t prompt_tokens);

/// Whether the cell does anything in the phase; "" or the reason why not.
std::string why_skipped(const Cell& cell, ReplayPhase phase);
/// The same on a given trace: without decode tokens nothing decodes, and a cut must lie in the prompt.
std::string why_skipped(const Cell& cell, ReplayPhase phase, const TraceInfo& info);

}  // namespace lacuna
