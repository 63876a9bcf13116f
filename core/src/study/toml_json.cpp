#include "study/toml_json.hpp"

#include <toml++/toml.h>
#include <filesystem>
#include <sstream>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

std::string place_of(const toml::node& node, const std::string& file) {
  const auto at = node.source().begin;
  return at ? file + ":" + std::to_string(at.line) + ":" + std::to_string(at.column) : file;
}

Json convert(const toml::node& node, const std::string& path, TomlDocument& out) {
  out.place[path] = place_of(node, out.file);
  if (const auto* table = node.as_table()) {
    Json object = Json::object();
    for (const auto& [key, value] : *table) {
      const std::string name(key.str());
      object[name] = convert(value, path.empty() ? name : path + "." + name, out);
    }
    return object;
  }
  if (const auto* array = node.as_array()) {
    Json list = Json::array();
    for (std::size_t i = 0; i < array->size(); ++i)
      list.push_back(convert(*array->get(i), path + "[" + std::to_string(i) + "]", out));
    return list;
  }
  if (const auto* v = node.as_string()) return v->get();
  if (const auto* v = node.as_integer()) return v->get();
  if (const auto* v = node.as_floating_point()) return v->get();
  if (const auto* v = node.as_boolean()) return v->get();
  throw Error(Problem{"a date or time in a scenario", "a string, number, boolean, list or table", "a date or time",
                      out.place[path], "quote it"});
}

}  // namespace

std::string TomlDocument::where(std::string path) const {
  for (;;) {
    if (const auto found = place.find(path); found != place.end()) return found->second;
    const auto cut = path.find_last_of(".[");
    if (cut == std::string::npos) return file;
    path.resize(cut);
  }
}

TomlDocument read_toml(const std::string& path) {
  TomlDocument out;
  out.file = path;
  if (!std::filesystem::is_regular_file(path))
    throw Error(Problem{"cannot read the scenario", "a TOML file", "nothing there", path, "check the path"});
  try {
    out.root = convert(toml::parse_file(path), "", out);
  } catch (const toml::parse_error& e) {
    const auto at = e.source().begin;
    throw Error(Problem{"TOML syntax error: " + std::string(e.description()), "", "",
                        path + ":" + std::to_string(at.line) + ":" + std::to_string(at.column),
                        "see docs/scenarios.md for the language"});
  }
  return out;
}

Json toml_value(const std::string& text) {
  try {
    TomlDocument scratch;
    scratch.file = "command line";
    return convert(toml::parse("v = " + text), "", scratch)["v"];
  } catch (const toml::parse_error&) {
    return text;
  }
}

}  // namespace lacuna
