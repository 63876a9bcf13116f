// The trace's metadata: strings in the file, checked facts in memory.
#pragma once

#include <map>
#include <string>

#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// Parses every field of format version 1; what it does not know becomes provenance. Throws Error naming the field.
TraceInfo parse_metadata(const std::map<std::string, std::string>& metadata, const std::string& path);

/// Checks that the facts agree with one another, sorts the layers and fills in what a trace in memory may leave out.
void validate(TraceInfo& info, const std::string& where);

}  // namespace lacuna
