// Axes: which values of a role table are lists one level deeper than their declared type, and the grid they span.
#pragma once

#include <string>
#include <vector>

#include "lacuna/strategy/registry.hpp"
#include "study/toml_json.hpp"

namespace lacuna {

struct Axis {
  std::string path;  // "select.page_size", "evict.base.window"
  Json values;       // a list
};

/// A role or a base that is a list stands for each of its items. Every one as a table with a name; "quest" is
/// {name = "quest"}. Throws Error for anything else; `where` goes with it.
std::vector<Json> role_variants(const Json& role, const std::string& where);

/// The axes of a role table, in key order; `path` prefixes their names, `place` is the table's path in the document.
std::vector<Axis> find_axes(const Registry& registry, const Json& role, const std::string& path,
                            const TomlDocument& document, const std::string& place);

/// Calls f with every combination of one value per axis, the last axis fastest.
template <class F>
void for_each_combination(const std::vector<Axis>& axes, F f) {
  std::vector<std::size_t> at(axes.size(), 0);
  for (;;) {
    f(at);
    std::size_t i = axes.size();
    while (i > 0 && ++at[i - 1] == axes[i - 1].values.size()) at[--i] = 0;
    if (i == 0) return;
  }
}

/// Writes a value at a dotted path, making tables on the way.
void assign(Json& root, const std::string& path, const Json& value);

/// Whether every value of an [[exclude]] table stands so in the description of a cell.
bool excluded(const Json& cell, const Json& exclusion);

}  // namespace lacuna
