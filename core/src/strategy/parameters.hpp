// Checks of parameter values: the one place that knows the types and ranges of a schema.
#pragma once

#include <string>
#include <vector>

#include "lacuna/strategy/instance.hpp"

namespace lacuna {

/// Whose value is being checked, for the message, and where relative file names start.
struct Place {
  std::string owner;  // "strategy 'quest'"
  std::string where;
  std::string directory;
};

/// Brings the value of a parameter into its canonical form (a whole number for a float becomes a float, a class table
/// becomes
/// {"layer": [heads]} in order). Throws Error for another type, a value out of range, or text that JSON could not
/// carry.
Json canonical_value(const ParamSpec& spec, const Json& value, const Place& place);

/// "a whole number in 1..4096", "a number in (0, 1]", "mean|max|sum": what a parameter takes.
std::string expectation(const ParamSpec& spec);

/// The parameters that a constraint is about.
std::vector<std::string> constraint_names(const sdk::Constraint& constraint);

/// Asks the plug-in whether its resolved own parameters go together. Throws Error with the constraint that they break
/// and the values it is about.
void check_together(const sdk::Entry& entry, const Json& own, const Place& place);

/// "did you mean ...?" if one of the names is near, else "": for errors that list the names anyway.
std::string near_name(const std::string& name, const std::vector<std::string>& known);

/// Values between which a budget knob is sought: its range, open ends drawn in a little; 4096 times the default, or
/// 4096, where it has no upper end.
struct KnobEnds {
  double lo, hi;
};
KnobEnds knob_ends(const ParamSpec& knob);

/// What is wrong with the type or range of a specification itself, or "".
std::string range_fault(const ParamSpec& spec);

/// density, tokens, units, mass, shape.
const std::vector<std::string>& budget_keys();

/// Reads the budget keys of a table; the others are ignored.
BudgetSpec read_budget(const Json& table, const Place& place);

/// Names that a strategy's own parameters cannot take, because the core acts on them.
const std::vector<std::string>& reserved_names();

}  // namespace lacuna
