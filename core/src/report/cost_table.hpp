// What a study's methods cost in time: tables for people, rows for programs.
#pragma once

#include <string>

#include "lacuna/report/study_result.hpp"

namespace lacuna {

/// The section "Cost on <device>"; "" where nothing was timed.
std::string cost_section(const StudyResult& study);

/// Header (peaks, source, memory) and rows of the timing pass.
Json cost_json(const CostResult& cost);

}  // namespace lacuna
