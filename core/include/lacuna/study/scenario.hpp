// Scenario files: a study as TOML, expanded into cells. The language is described in docs/scenarios.md.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lacuna/replay/replay.hpp"
#include "lacuna/replay/timing.hpp"
#include "lacuna/strategy/registry.hpp"

namespace lacuna {

/// What the command line changes in a scenario.
struct Overrides {
  /// "role.key=value", "role.base.key=value", or "key=value" where one role has the key; the value as TOML, else text.
  std::vector<std::string> set;
  std::vector<double> density;  // replaces [budget]
  std::vector<std::uint64_t> seed;
  std::optional<std::string> device;
  bool check = false;
  bool no_cost = false;  // nothing is timed
};

struct Scenario {
  std::string name, path;
  std::vector<std::string> traces;              // as paths that can be opened
  std::vector<std::string> calibration_traces;  // likewise: where budget knobs are set (`calibrate = true`)
  std::string device = "cpu";
  ReplayOptions options;  // phases, check, page_size, min_context, default_density
  CostOptions cost;
  /// In the file's order; budgets, then seeds innermost; axes in name order, the last fastest. A cell without a
  /// stochastic strategy has the first seed alone.
  std::vector<Cell> cells;
};

/// Parses and expands. Throws Error with file:line:column for syntax, unknown keys (naming the nearest), wrong types
/// and everything that resolve() refuses.
Scenario load_scenario(const std::string& path, const Registry& registry, const Overrides& overrides);

/// One cell from role tables (select, evict, allocate; each a name or a table) given as JSON, as `dump` uses it.
Cell make_cell(const Registry& registry, const Json& roles, std::uint64_t seed, const std::string& where,
               const std::string& directory);

/// Writes each "role.key=value" into the role tables of `roles`, names of bases first. Throws Error for one that
/// nothing in `roles` has, or a bare key that belongs to several roles.
void apply_settings(const Registry& registry, Json& roles, const std::vector<std::string>& settings);

}  // namespace lacuna
