// From the rows of one method to the line of a table.
#pragma once

#include <string>
#include <vector>

#include "lacuna/report/tables.hpp"

namespace lacuna {

/// The rows of a method in one phase, all its traces, layers and seeds; none failed.
struct MethodRows {
  std::string label;
  std::vector<int> cells;
  std::vector<const Row*> rows;
};

/// Pools the rows on `layers`. `dense`: rows of the dense baseline for touched_share, or null. Traces come in the
/// study's order.
Line pool_rows(const StudyResult& study, const MethodRows& method, const std::vector<int>& layers,
               const MethodRows* dense);

/// The roles that do something in a phase, without the seed: methods that are equal here are one line.
Json acting_roles(const Cell& cell, ReplayPhase phase);
/// The role whose budget a phase's comparison is made at; null without one.
const Resolved* budget_role(const Cell& cell, ReplayPhase phase);
/// "density 0.2"; "" for none.
std::string budget_text(const BudgetSpec& budget);

}  // namespace lacuna
