// Text inside a table of markdown.
#pragma once

#include <string>

namespace lacuna {

/// Cells of a table must not end it.
inline std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

}  // namespace lacuna
