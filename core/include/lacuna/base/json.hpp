// JSON from outside, parsed strictly.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace lacuna {

/// Parses the whole text as one value. Throws Error for a syntax error (with line and column) and for a key that stands
/// twice in one object, which JSON libraries otherwise resolve silently, each in its own way.
/// `what` names the text ("metadata 'rope'"), `where` its place (a path).
nlohmann::json parse_json(std::string_view text, const std::string& what, const std::string& where);

/// The value as one line for an error message, shortened if long.
std::string excerpt(const nlohmann::json& value);

}  // namespace lacuna
