// Text files that a reader never sees half of.
#pragma once

#include <string>

namespace lacuna {

/// Writes the text to a file beside `path` and renames it. Throws Error that names `what` ("the JSON file"); then
/// nothing is left and what stood there stays.
void write_text(const std::string& text, const std::string& path, const std::string& what);

}  // namespace lacuna
