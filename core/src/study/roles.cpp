#include "study/roles.hpp"

#include <algorithm>
#include <tuple>

#include "lacuna/base/error.hpp"
#include "lacuna/study/scenario.hpp"
#include "study/expand.hpp"

namespace lacuna {
namespace {

bool is_budget_kind(const std::string& key) {
  return std::find(budget_kinds().begin(), budget_kinds().end(), key) != budget_kinds().end();
}

const StrategyType& type_of(const Registry& registry, const Json& role) {
  return registry.find(role["name"].get<std::string>());
}

bool has_key(const Registry& registry, const Json& role, RoleKind kind, const std::string& key) {
  const StrategyType& type = type_of(registry, role);
  if (is_budget_kind(key) || key == "shape")
    return kind != RoleKind::allocate && (type.entry().takes_budget || role.value("calibrate", Json(false)) == true);
  if (key == "preset") return !type.presets().empty();
  if (key == "calibrate") return kind == RoleKind::select;
  if (key == "base") return type.entry().wrapper != 0;
  const auto params = type.params(kind);
  return std::any_of(params.begin(), params.end(), [&](const ParamSpec& p) { return p.name == key; });
}

std::string text_of(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.is_object() ? "table" : value.dump();
}

std::string label_of(const Json& role, const std::string& path, const std::set<std::string>& axes) {
  std::string inside;
  for (const auto& [key, value] : role.items()) {
    const bool quiet = key == "dense_layers" || key == "cut" || key == "shape";
    if (key == "name" || is_budget_kind(key) || (quiet && !axes.contains(path + "." + key))) continue;
    const std::string text = key == "base" ? label_of(value, path + ".base", axes) : text_of(value);
    inside += (inside.empty() ? "" : ", ") + key + "=" + text;
  }
  return role["name"].get<std::string>() + (inside.empty() ? "" : "(" + inside + ")");
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

constexpr const char* kCommandLine = "command line";

/// Whether `key` is a place inside a class table, "classes.layer.3.full"; `parameter` becomes "classes".
bool is_inside_classes(const Registry& registry, const Json& role, RoleKind kind, const std::string& key,
                       std::string& parameter) {
  parameter = key.substr(0, key.find('.'));
  if (parameter == key) return false;
  const auto params = type_of(registry, role).params(kind);
  return std::any_of(params.begin(), params.end(),
                     [&](const ParamSpec& p) { return p.name == parameter && p.type == "classes"; });
}

}  // namespace

const std::vector<std::string>& role_names() {
  static const std::vector<std::string> names = {"select", "evict", "allocate"};
  return names;
}

RoleKind kind_of(const std::string& role) {
  return role == "select" ? RoleKind::select : role == "evict" ? RoleKind::evict : RoleKind::allocate;
}

const std::vector<std::string>& budget_kinds() {
  static const std::vector<std::string> kinds = {"density", "tokens", "units", "mass"};
  return kinds;
}

void add_budget(const Registry& registry, Json& role, RoleKind kind, const Json& budget) {
  if (kind == RoleKind::allocate) return;
  const StrategyType& type = type_of(registry, role);
  if (role.contains("density") && role["density"] == "none") {
    role.erase("density");
    return;
  }
  const bool calibrates = role.value("calibrate", Json(false)) == true;
  if (type.entry().wrapper && kind == RoleKind::select && !calibrates) {  // in eviction a base only ranks
    if (role.contains("base")) add_budget(registry, role["base"], kind, budget);
    return;
  }
  const auto& kinds = budget_kinds();
  if (!(type.entry().takes_budget || calibrates) ||
      std::any_of(kinds.begin(), kinds.end(), [&](const auto& k) { return role.contains(k); }))
    return;
  for (const auto& [key, value] : budget.items()) {
    const bool has_tiles = kind == RoleKind::select && type.in_phase(sdk::kPrefill);
    if (key != "shape" || (has_tiles && !calibrates && !role.contains(key))) role[key] = value;
  }
}

std::string label_of_cell(const Json& roles, const std::set<std::string>& axes) {
  std::string label;
  if (roles.contains("evict")) label = label_of(roles["evict"], "evict", axes);
  if (roles.contains("allocate")) label += (label.empty() ? "" : " + ") + label_of(roles["allocate"], "allocate", axes);
  if (roles.contains("select")) label += (label.empty() ? "" : " → ") + label_of(roles["select"], "select", axes);
  return label;
}

std::string label_of_axes(const Json& roles, const std::set<std::string>& axes) {
  std::string inside;
  for (const std::string& path : axes) {
    const Json* at = &roles;
    std::string key;
    for (std::size_t begin = 0; begin != std::string::npos;) {
      const std::size_t dot = path.find('.', begin);
      key = path.substr(begin, dot - begin);
      at = &at->at(key);
      begin = dot == std::string::npos ? dot : dot + 1;
    }
    if (!is_budget_kind(key)) inside += (inside.empty() ? "" : ", ") + path + "=" + text_of(*at);
  }
  return inside.empty() ? "" : "(" + inside + ")";
}

std::vector<Setting> read_settings(const Registry& registry, const std::vector<Json>& studied,
                                   const std::vector<std::string>& texts) {
  std::vector<Setting> out;
  for (const std::string& text : texts) {
    const auto equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
      throw Error({"--set without a value", "role.key=value", text, kCommandLine, ""});
    Setting setting{text, text.substr(0, equals), toml_value(text.substr(equals + 1))};
    if (setting.path.find('.') == std::string::npos) {
      std::set<std::string> owners;
      for (const Json& roles : studied)
        for (const auto& [role, table] : roles.items())
          if (has_key(registry, table, kind_of(role), setting.path)) owners.insert(role);
      if (owners.size() > 1)
        throw Error({"--set " + text + " is ambiguous", "one role that has '" + setting.path + "'",
                     *owners.begin() + " and " + *owners.rbegin(), kCommandLine,
                     "Write " + *owners.begin() + "." + text + "."});
      // Without an owner the path names no role, and apply() finds no place for it.
      if (!owners.empty()) setting.path = *owners.begin() + "." + setting.path;
    } else if (const std::string role = setting.path.substr(0, setting.path.find('.'));
               std::find(role_names().begin(), role_names().end(), role) == role_names().end()) {
      throw Error(
          {"--set " + text + ": unknown role '" + role + "'", "", "", kCommandLine, suggestion(role, role_names())});
    }
    out.push_back(std::move(setting));
  }
  const auto is_base_name = [](const Setting& s) {
    return ends_with(s.path, ".base") || ends_with(s.path, ".base.name");
  };
  std::stable_sort(out.begin(), out.end(), [&](const Setting& a, const Setting& b) {
    return std::tuple(!is_base_name(a), is_base_name(a) ? a.path.size() : 0) <
           std::tuple(!is_base_name(b), is_base_name(b) ? b.path.size() : 0);
  });
  return out;
}

bool apply(const Registry& registry, Json& roles, const Setting& setting) {
  const auto dot = setting.path.find('.');
  if (dot == std::string::npos) return false;
  const std::string role = setting.path.substr(0, dot);
  if (!roles.contains(role)) return false;
  Json* table = &roles[role];
  std::string key = setting.path.substr(dot + 1);
  for (; key.rfind("base.", 0) == 0; key.erase(0, 5)) {
    if (!type_of(registry, *table).entry().wrapper) return false;
    if (key == "base.name") {
      (*table)["base"]["name"] = setting.value;
      return true;
    }
    if (const std::string base = type_of(registry, *table).default_base(); !table->contains("base") && !base.empty())
      (*table)["base"] = Json::parse(base);
    if (!table->contains("base")) return false;
    table = &(*table)["base"];
  }
  if (std::string parameter; is_inside_classes(registry, *table, kind_of(role), key, parameter)) {
    if (table->contains(parameter) && !(*table)[parameter].is_object())
      throw Error(
          {"--set " + setting.text + ": '" + parameter + "' is a file, which has no places of its own",
           "a class table in the scenario", (*table)[parameter].dump(), kCommandLine,
           "Change the file, or set the whole table: --set '" + role + "." + parameter + "={layer.3.full=[0, 2]}'."});
    assign(*table, key, setting.value);
    return true;
  }
  if (!has_key(registry, *table, kind_of(role), key)) return false;
  (*table)[key] = key == "base" ? role_variants(setting.value, kCommandLine).front() : setting.value;
  return true;
}

Error unused_setting(const Registry& registry, const std::vector<Json>& studied, const Setting& setting) {
  const std::string role = setting.path.substr(0, setting.path.find('.'));
  const std::string key = setting.path.substr(setting.path.rfind('.') + 1);
  std::set<std::string> known;
  for (const Json& roles : studied)
    for (const Json* table = roles.contains(role) ? &roles[role] : nullptr; table && table->contains("name");
         table = table->contains("base") ? &(*table)["base"] : nullptr)
      for (const ParamSpec& p : registry.find((*table)["name"].get<std::string>()).params(kind_of(role)))
        known.insert(p.name);
  return Error({"--set " + setting.text + " changes nothing",
                known.empty() ? "a role that a strategy of the study has" : "a parameter of the role's strategies",
                setting.path, kCommandLine, suggestion(key, {known.begin(), known.end()})});
}

std::string why_not_shared(const Cell& cell) {
  if (!cell.allocate) return "";
  const Resolved* served = cell.evict ? &*cell.evict : cell.select ? &*cell.select : nullptr;
  if (!served) return "";
  const sdk::Entry& e = served->type->entry();
  const bool by_rules = cell.allocate->type->entry().takes_budget == 0;
  const bool chooses = cell.evict ? e.retain && !e.score && (!e.takes_budget || by_rules) : e.mark || e.refine;
  if (!chooses) return "";
  return "'" + served->type->name() + "' chooses by itself, without a ranking or a target of each head, so '" +
         cell.allocate->type->name() + "' would change nothing";
}

void apply_settings(const Registry& registry, Json& roles, const std::vector<std::string>& settings) {
  for (const Setting& s : read_settings(registry, {roles}, settings)) {
    if (!apply(registry, roles, s)) throw unused_setting(registry, {roles}, s);
  }
}

}  // namespace lacuna
