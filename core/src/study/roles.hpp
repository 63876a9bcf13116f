// Role tables of one strategy of a study, before they are resolved: budgets, labels, and what --set changes.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/row.hpp"
#include "lacuna/strategy/instance.hpp"

namespace lacuna {

/// select, evict, allocate.
const std::vector<std::string>& role_names();
RoleKind kind_of(const std::string& role);

/// density, tokens, units, mass.
const std::vector<std::string>& budget_kinds();

/// Gives the study's default budget to a role that takes one and has none; a wrapper passes it to its base.
/// `density = "none"` refuses it, in a wrapper for its base too.
void add_budget(const Registry& registry, Json& role, RoleKind kind, const Json& budget);

/// "snapkv(window=32) + ada → quest": names and the parameters that were given. Budgets, dense_layers and cut are
/// left out unless the study varies them (`axes`: paths such as "select.dense_layers"); budgets always.
std::string label_of_cell(const Json& roles, const std::set<std::string>& axes);
/// "(select.page_size=16)": the axes' values alone, for a cell that the scenario names itself; "" without axes.
std::string label_of_axes(const Json& roles, const std::set<std::string>& axes);

/// A setting of the command line. `path` starts with its role.
struct Setting {
  std::string text, path;
  Json value;
};

/// Reads "role.key=value", or "key=value" where one role alone of all `studied` strategies has the key; names of bases
/// come first, since they decide what else is a key. Throws Error.
std::vector<Setting> read_settings(const Registry& registry, const std::vector<Json>& studied,
                                   const std::vector<std::string>& texts);

/// The error for a setting that no strategy of the study takes, with the nearest parameters of its role.
Error unused_setting(const Registry& registry, const std::vector<Json>& studied, const Setting& setting);

/// Why the cell's allocator could not act on the strategy that it serves (evict, or select without an evict role); ""
/// if it can.
std::string why_not_shared(const Cell& cell);

/// Writes it into the role tables; a key may lead into a class table ("allocate.classes.layer.3.full"). False when the
/// role is not there or its strategy lacks the key.
bool apply(const Registry& registry, Json& roles, const Setting& setting);

}  // namespace lacuna
