// What share of dense attention a line of a table read.
#pragma once

#include "report/pool.hpp"

namespace lacuna {

/// Fills realised, target and read shares of a method's line from all its rows, also of layers that are not compared.
void fill_shares(const StudyResult& study, const MethodRows& method, Line& line);

}  // namespace lacuna
