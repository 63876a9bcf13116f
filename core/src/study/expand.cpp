#include "study/expand.hpp"

#include <algorithm>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

int depth(const Json& value) { return value.is_array() ? 1 + (value.empty() ? 0 : depth(value[0])) : 0; }

/// List depth of a value of a parameter: a class table and a strategy are tables.
int declared_depth(const StrategyType& type, const std::string& key) {
  for (const ParamSpec& p : type.params())
    if (p.name == key) return p.type == "ints" ? 1 : 0;
  return 0;
}

}  // namespace

std::vector<Json> role_variants(const Json& role, const std::string& where) {
  std::vector<Json> out;
  if (role.is_array()) {
    for (const Json& item : role)
      for (Json& variant : role_variants(item, where)) out.push_back(std::move(variant));
    if (!out.empty()) return out;
  }
  if (role.is_string()) return {Json{{"name", role}}};
  if (!role.is_object() || !role.contains("name") || !role["name"].is_string())
    throw Error({"a role without a strategy", "a name or { name = \"...\" }", role.dump(), where, ""});
  if (!role.contains("base")) return {role};
  for (Json& base : role_variants(role["base"], where)) {
    out.push_back(role);
    out.back()["base"] = std::move(base);
  }
  return out;
}

std::vector<Axis> find_axes(const Registry& registry, const Json& role, const std::string& path,
                            const TomlDocument& document, const std::string& place) {
  std::vector<Axis> axes;
  const StrategyType& type = registry.find(role["name"].get<std::string>());
  for (const auto& [key, value] : role.items()) {
    if (key == "base") {
      for (Axis& a : find_axes(registry, value, path + ".base", document, place + ".base"))
        axes.push_back(std::move(a));
      continue;
    }
    // An empty list of a list type is a value; of any other type it is an axis without a point.
    if (depth(value) <= declared_depth(type, key)) continue;
    if (value.empty())
      throw Error({"an axis without a value: " + path + "." + key, "at least one", "[]",
                   document.where(place + "." + key), "Give a value or remove the key."});
    axes.push_back({path + "." + key, value});
  }
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.path < b.path; });
  return axes;
}

void assign(Json& root, const std::string& path, const Json& value) {
  Json* at = &root;
  std::size_t begin = 0;
  for (;;) {
    const std::size_t dot = path.find('.', begin);
    at = &(*at)[path.substr(begin, dot - begin)];
    if (dot == std::string::npos) break;
    begin = dot + 1;
  }
  *at = value;
}

bool excluded(const Json& cell, const Json& exclusion) {
  return std::all_of(exclusion.items().begin(), exclusion.items().end(), [&](const auto& item) {
    if (!cell.contains(item.key())) return false;
    const Json& found = cell[item.key()];
    if (item.value().is_object()) return found.is_object() && excluded(found, item.value());
    // "quest" stands for the table of that name, with whatever parameters.
    if (found.is_object() && found.contains("name")) return found["name"] == item.value();
    return found == item.value();
  });
}

}  // namespace lacuna
