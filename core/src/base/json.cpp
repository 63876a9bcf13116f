#include "lacuna/base/json.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "lacuna/base/error.hpp"

namespace lacuna {

nlohmann::json parse_json(std::string_view text, const std::string& what, const std::string& where) {
  using nlohmann::json;
  std::vector<std::set<std::string>> open_objects;
  auto watch = [&](int, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) open_objects.emplace_back();
    if (event == json::parse_event_t::object_end) open_objects.pop_back();
    if (event == json::parse_event_t::key && !open_objects.back().insert(parsed.get<std::string>()).second) {
      throw Error({what + " names a key twice", "each key once in an object", excerpt(parsed) + " a second time", where,
                   "Remove one of the two."});
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    std::string reason = e.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    if (const auto end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    throw Error({what + " is not valid JSON", "one JSON value", reason, where, ""});
  }
}

std::string excerpt(const nlohmann::json& value) {
  constexpr std::size_t kMost = 80;
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMost) text = fmt::format("{}... ({} characters)", text.substr(0, kMost), text.size());
  return text;
}

}  // namespace lacuna
