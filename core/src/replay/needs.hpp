// What the strategies of a cell cannot do without, and whether a trace has it.
#pragma once

#include <string>
#include <vector>

#include "lacuna/replay/row.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// Whether a strategy of the cell, or its base, declares one of the needs.
bool asks_for(const Cell& cell, sdk::i32 needs);
/// What only a trace of the model itself can serve.
inline constexpr sdk::i32 kNeedsOfTrace =
    sdk::kNeedsAllLayers | sdk::kNeedsProjection | sdk::kNeedsStatistics | sdk::kNeedsQuestion | sdk::kNeedsData;
/// What the trace or the settings lack for the cell ("needs W_O, which the trace has not"), or "". A cell that was
/// calibrated on this very trace lacks another one, unless `allow_leak`.
std::string missing_need(const Cell& cell, const Trace& trace, bool allow_leak);
/// Whether a strategy of the cell was calibrated on this trace.
bool leaks(const Cell& cell, const Trace& trace);
/// Mean entropy of every layer's dense attention [num_layers] where a cell asks for it and the trace has every layer,
/// else empty.
std::vector<double> layer_entropy(const Trace& trace, const std::vector<Cell>& cells);

}  // namespace lacuna
