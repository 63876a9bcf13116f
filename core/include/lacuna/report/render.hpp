// What `lacuna run` gives: tables for people, JSON for programs.
#pragma once

#include <string>
#include <vector>

#include "lacuna/report/tables.hpp"

namespace lacuna {

/// Markdown: header, a table each, notes below it, then skipped and failed cells. Equal studies give equal text.
std::string to_markdown(const StudyResult& study, const std::vector<Table>& tables);

/// Everything: resolved scenario, header, cells, rows with their metrics summarised, tables, skips. Times stand under
/// "time" of each row and under "cost", which is there only where a GPU was timed; the rest of two equal studies is
/// equal.
Json to_json(const StudyResult& study, const std::vector<Table>& tables);

/// Shortest numbers that read back to the same bits; what is not finite as null. A temporary file beside it, then a
/// rename. Throws Error when it cannot be written.
void write_json(const Json& json, const std::string& path);

}  // namespace lacuna
