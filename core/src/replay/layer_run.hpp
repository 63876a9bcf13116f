// One layer of a trace under the cells of a study.
#pragma once

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "lacuna/pipeline/runtime.hpp"
#include "lacuna/replay/replay.hpp"

namespace lacuna {

/// What a trace's layers share.
struct AcrossLayers {
  std::set<std::pair<int, ReplayPhase>> skipped;                 // (cell, phase)
  std::map<std::pair<int, ReplayPhase>, CarriedArrays> carried;  // a cell has one cut
  std::vector<double> entropy;                                   // [num_layers], where a cell asks for it

  std::set<int> now;  // the cells of this pass over the layers
  bool noise = true;  // the pass gives the noise floor

  bool acts(int cell, ReplayPhase phase) const { return now.contains(cell) && !skipped.contains({cell, phase}); }
  const double* entropy_data() const { return entropy.empty() ? nullptr : entropy.data(); }
};

/// Replays the cells that act now in every phase of the layer and adds their rows to the result, by phase and cut, then
/// by cell. Throws Error for a bad layer or too little memory; a strategy's failure makes its own rows "failed".
void run_layer(const Trace& trace, int layer, const std::vector<Cell>& cells, const ReplayOptions& options,
               AcrossLayers& across, ReplayResult& result);

}  // namespace lacuna
