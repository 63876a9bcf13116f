// The [cost] table of a scenario.
#pragma once

#include "lacuna/replay/timing.hpp"
#include "study/toml_json.hpp"

namespace lacuna {

/// `run_phases`: the default of its phases. Without `time` a study is timed where `on_gpu`; `skip`: not at all. Throws
/// Error for an unknown key, a wrong value, and time = true where there is no GPU.
CostOptions read_cost(const TomlDocument& document, const std::set<ReplayPhase>& run_phases, bool on_gpu, bool skip);

}  // namespace lacuna
