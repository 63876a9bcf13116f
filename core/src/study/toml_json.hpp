// TOML as JSON, with the place of every value.
#pragma once

#include <map>
#include <string>

#include "lacuna/strategy/instance.hpp"

namespace lacuna {

/// A parsed file. `place` maps a value's path ("strategy[2].select.page_size") to "file:line:column".
struct TomlDocument {
  Json root;
  std::string file;
  std::map<std::string, std::string> place;

  /// Of the path, or of the nearest enclosing one.
  std::string where(std::string path) const;
};

/// Throws Error with file:line:column.
TomlDocument read_toml(const std::string& path);
/// A single value as it would stand after "key =", or the text itself when it is not valid TOML (a bare word).
Json toml_value(const std::string& text);

}  // namespace lacuna
