// What is learned from traces before a study: the arrays of a strategy's Data parameter, and the value of a budget knob
// that reaches a density.
#pragma once

#include <string>
#include <vector>

#include "lacuna/replay/row.hpp"
#include "lacuna/strategy/calibration_file.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// Runs the strategy's calibrate() over every layer that all traces have, on the CPU; the file says what it was made
/// of. Throws Error for a strategy that does not calibrate, traces of different shapes, or its own failure.
CalibrationFile calibrate(const Resolved& strategy, const std::vector<Trace>& traces);

/// The parameter of type data that the strategy's calibration fills, or "".
std::string data_parameter(const StrategyType& type);

struct KnobValue {
  double value = 0, realised = 0;
};

/// Bisects the select strategy's budget knob until the density that the cell realises in its first phase (prefill, else
/// decode), the mean over the traces' layers that it leaves sparse, is nearest to what it asks for. Throws Error for a
/// strategy without a knob, or one whose knob moves nothing.
KnobValue calibrate_knob(const Cell& cell, const std::vector<Trace>& traces);

/// What a study calibrates before it runs: the knobs of cells that ask for it (`calibrate = true`), and the arrays of
/// strategies that need a file and name none. Equal settings are calibrated once.
void calibrate_cells(std::vector<Cell>& cells, const std::vector<Trace>& traces);

}  // namespace lacuna
