#include "lacuna/study/scenario.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <set>

#include "lacuna/base/error.hpp"
#include "study/cost.hpp"
#include "study/expand.hpp"
#include "study/roles.hpp"

namespace lacuna {
namespace {

constexpr std::size_t kMostCells = 100'000;
constexpr const char* kCommandLine = "command line";

Error wrong_type(const std::string& key, const std::string& expected, const Json& found, const std::string& where) {
  return Error({"wrong value of " + key, expected, found.dump(), where, ""});
}

bool is_stochastic(const std::optional<Resolved>& role) {
  for (const Resolved* r = role ? &*role : nullptr; r; r = r->base.get())
    if (r->type->entry().stochastic) return true;
  return false;
}

class Loader {
 public:
  Loader(const std::string& path, const Registry& registry, const Overrides& overrides)
      : document_(read_toml(path)),
        registry_(registry),
        overrides_(overrides),
        directory_(std::filesystem::path(path).parent_path().string()) {
    out_.path = path;
  }

  Scenario load() {
    const Json& root = document_.root;
    check_keys(root, "", {"name", "trace", "calibration", "run", "cost", "budget", "strategy", "exclude"});
    out_.name =
        root.contains("name") ? string_at(root["name"], "name") : std::filesystem::path(out_.path).stem().string();
    check_keys(table_at("trace"), "trace", {"files"});
    out_.traces = read_files(table_at("trace"), "trace");
    if (out_.traces.empty())
      throw Error({"a scenario without traces", "[trace] files = [...]", "none", document_.where("trace"),
                   "Name at least one trace."});
    read_calibration_table(table_at("calibration"));
    read_run(table_at("run"));
    out_.cost = read_cost(document_, out_.options.phases, out_.device == "cuda", overrides_.no_cost);
    read_budgets(table_at("budget"));
    check_exclusions(list_of_tables("exclude"));
    read_strategies(list_of_tables("strategy"));
    if (out_.cells.empty()) throw Error({"no cell is left", "at least one", "none", out_.path, "Check [[exclude]]."});
    return std::move(out_);
  }

 private:
  struct Entry {
    std::string place;
    std::optional<std::string> label;
    Json roles;  // one of its variants
  };

  void check_keys(const Json& table, const std::string& path, const std::vector<std::string>& known) const {
    for (const auto& [key, value] : table.items())
      if (std::find(known.begin(), known.end(), key) == known.end())
        throw Error({"unknown key '" + key + "'" + (path.empty() ? "" : " in " + path), "", "",
                     document_.where(path.empty() ? key : path + "." + key), suggestion(key, known)});
  }
  std::string string_at(const Json& value, const std::string& path) const {
    if (!value.is_string()) throw wrong_type(path, "a string", value, document_.where(path));
    return value.get<std::string>();
  }
  Json table_at(const std::string& key) const {
    const Json table = document_.root.value(key, Json::object());
    if (!table.is_object()) throw wrong_type(key, "a table, [" + key + "]", table, document_.where(key));
    return table;
  }
  Json list_of_tables(const std::string& key) const {
    const Json list = document_.root.value(key, Json::array());
    if (!list.is_array() || !std::all_of(list.begin(), list.end(), [](const Json& t) { return t.is_object(); }))
      throw wrong_type(key, "tables, each [[" + key + "]]", list, document_.where(key));
    return list;
  }
  static Json as_list(const Json& value) { return value.is_array() ? value : Json::array({value}); }

  /// Relative to the scenario; one that is not there may lie in LACUNA_TRACE_DIR under its own name.
  std::string find_trace(const std::filesystem::path& file) const {
    const auto beside = (file.is_absolute() ? file : std::filesystem::path(directory_) / file).lexically_normal();
    const char* elsewhere = std::getenv("LACUNA_TRACE_DIR");
    if (elsewhere && !std::filesystem::exists(beside))
      if (const auto there = std::filesystem::path(elsewhere) / file.filename(); std::filesystem::exists(there))
        return there.string();
    return beside.string();
  }

  std::vector<std::string> read_files(const Json& table, const std::string& name) const {
    std::vector<std::string> out;
    for (const Json& f : as_list(table.value("files", Json::array()))) {
      const std::filesystem::path file = string_at(f, name + ".files");
      out.push_back(find_trace(file));
      if (std::count(out.begin(), out.end(), out.back()) > 1)
        throw Error(
            {"a trace named twice", "different traces", f.dump(), document_.where(name + ".files"), "Remove one."});
    }
    return out;
  }

  void read_calibration_table(const Json& table) {
    check_keys(table, "calibration", {"files", "allow_leak"});
    out_.calibration_traces = read_files(table, "calibration");
    const Json leak = table.value("allow_leak", Json(false));
    if (!leak.is_boolean())
      throw wrong_type("calibration.allow_leak", "true or false", leak, document_.where("calibration.allow_leak"));
    out_.options.allow_leak = leak.get<bool>();
  }

  void read_run(const Json& table) {
    check_keys(table, "run", {"device", "seed", "phases", "page_size", "min_context", "check", "cut"});
    read_device(table);
    const std::vector<std::string> phases = {name_of(ReplayPhase::prefill), name_of(ReplayPhase::evict),
                                             name_of(ReplayPhase::decode)};
    for (const Json& p : as_list(table.value("phases", Json(phases)))) {
      const std::string name = string_at(p, "run.phases");
      const auto found = std::find(phases.begin(), phases.end(), name);
      if (found == phases.end())
        throw Error({"unknown phase '" + name + "'", "", "", document_.where("run.phases"), suggestion(name, phases)});
      out_.options.phases.insert(static_cast<ReplayPhase>(found - phases.begin()));
    }
    if (out_.options.phases.empty())
      throw Error({"a scenario without phases", "one or more of prefill, evict, decode", "none",
                   document_.where("run.phases"), "Leave phases out for all of them."});
    constexpr std::int64_t kMostTokens = 1 << 30;
    const auto whole = [&](const char* key, std::int64_t least, std::int64_t most) -> std::optional<std::int64_t> {
      if (!table.contains(key)) return std::nullopt;
      const std::string path = std::string("run.") + key;
      const Json& value = table[key];
      if (!value.is_number_integer() || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
        throw wrong_type(path, "a whole number in " + std::to_string(least) + ".." + std::to_string(most), value,
                         document_.where(path));
      return value.get<std::int64_t>();
    };
    if (const auto v = whole("page_size", 1, 4096)) out_.options.page_size = static_cast<sdk::i32>(*v);
    out_.options.min_context = whole("min_context", 0, kMostTokens);
    const Json check = table.value("check", Json(false));
    if (!check.is_boolean()) throw wrong_type("run.check", "true or false", check, document_.where("run.check"));
    out_.options.check = overrides_.check || check.get<bool>();
    seeds_ = overrides_.seed;
    if (!seeds_.empty()) return read_cuts(table);
    for (const Json& s : as_list(table.value("seed", Json::array({0})))) {
      if (!s.is_number_integer() || s.get<std::int64_t>() < 0)
        throw wrong_type("run.seed", "whole numbers of at least 0", s, document_.where("run.seed"));
      seeds_.push_back(s.get<std::uint64_t>());
    }
    if (seeds_.empty()) throw wrong_type("run.seed", "at least one seed", table["seed"], document_.where("run.seed"));
    read_cuts(table);
  }

  void read_device(const Json& table) {
    const bool given = overrides_.device.has_value();
    const std::string where = given ? kCommandLine : document_.where("run.device");
    out_.device = given ? *overrides_.device : string_at(table.value("device", Json("cpu")), "run.device");
    if (out_.device != "cpu" && out_.device != "cuda")
      throw Error({"unknown device", "cpu or cuda", "'" + out_.device + "'", where, ""});
  }

  void read_cuts(const Json& table) {
    if (!table.contains("cut")) return;
    const Json cuts = as_list(table["cut"]);
    for (const Json& cut : cuts)
      if (!(cut == "end" || cut == "before_question" || (cut.is_number_integer() && cut > 0)))
        throw wrong_type("run.cut", "end, before_question or a number of tokens", cut, document_.where("run.cut"));
    if (cuts.empty()) throw wrong_type("run.cut", "at least one cut", cuts, document_.where("run.cut"));
    cut_ = cuts.size() == 1 ? cuts[0] : cuts;
  }

  void read_budgets(const Json& table) {
    std::vector<std::string> keys = budget_kinds();
    keys.emplace_back("shape");
    check_keys(table, "budget", keys);
    std::string kind;
    for (const auto& [key, value] : table.items()) {
      if (key == "shape") continue;
      if (!kind.empty())
        throw Error({"two kinds of budget", "one of density, tokens, units, mass", kind + " and " + key,
                     document_.where("budget." + key), "Keep one."});
      kind = key;
    }
    Json values = kind.empty() ? Json::array() : as_list(table[kind]);
    if (!overrides_.density.empty()) kind = "density", values = overrides_.density;
    const std::string where = overrides_.density.empty() ? document_.where("budget." + kind) : kCommandLine;
    const bool share = kind == "density" || kind == "mass";
    for (const Json& v : values) {
      const bool valid = share ? v.is_number() && v > 0 && v <= 1 : v.is_number_integer() && v > 0;
      if (!valid) throw wrong_type("budget." + kind, share ? "numbers in (0, 1]" : "whole numbers above 0", v, where);
      Json budget{{kind, v}};
      if (kind == "density") {
        out_.options.default_density = std::min(out_.options.default_density, v.get<double>());
        if (table.contains("shape")) budget["shape"] = table["shape"];
      }
      budgets_.push_back(std::move(budget));
    }
    if (budgets_.empty()) budgets_.push_back(Json::object());
    if (!table.contains("shape")) return;
    if (kind != "density" || !(table["shape"] == "constant" || table["shape"] == "proportional"))
      throw wrong_type("budget.shape", "constant or proportional, beside a density", table["shape"],
                       document_.where("budget.shape"));
  }

  /// An exclusion with a name that no cell can have would silently drop nothing.
  void check_exclusions(const Json& exclusions) const {
    std::vector<std::string> roles = role_names(), keys = budget_kinds();
    roles.emplace_back("seed");
    keys.insert(keys.end(), {"name", "base", "shape"});
    for (const StrategyType* type : registry_.all())
      for (const ParamSpec& p : type->params()) keys.push_back(p.name);
    for (std::size_t i = 0; i < exclusions.size(); ++i) {
      const std::string place = "exclude[" + std::to_string(i) + "]";
      check_keys(exclusions[i], place, roles);
      for (const auto& [role, value] : exclusions[i].items())
        for (const Json* table = &value; table->is_object(); table = &table->at("base")) {
          check_keys(*table, place + "." + role, keys);
          if (!table->contains("base")) break;
        }
    }
  }

  void read_strategies(const Json& list) {
    if (list.empty())
      throw Error({"a scenario without strategies", "[[strategy]] tables", "none", out_.path,
                   "Add [[strategy]] and, say, select = \"quest\"."});
    std::vector<Entry> entries;
    std::vector<Json> studied;
    for (std::size_t i = 0; i < list.size(); ++i)
      for (Entry& e : read_strategy(list[i], "strategy[" + std::to_string(i) + "]")) {
        studied.push_back(e.roles);
        entries.push_back(std::move(e));
      }
    for (const Setting& setting : read_settings(registry_, studied, overrides_.set)) {
      bool used = false;
      for (Entry& e : entries) used |= apply(registry_, e.roles, setting);
      if (!used) throw unused_setting(registry_, studied, setting);
    }
    for (const Entry& e : entries) add_strategy(e);
  }

  std::vector<Entry> read_strategy(const Json& table, const std::string& place) const {
    check_keys(table, place, {"label", "select", "evict", "allocate"});
    std::optional<std::string> label;
    if (table.contains("label")) label = string_at(table["label"], place + ".label");
    std::vector<Entry> out = {{place, label, Json::object()}};
    for (const std::string& role : role_names()) {
      if (!table.contains(role)) continue;
      const std::string where = document_.where(place + "." + role);
      std::vector<Entry> wider;
      for (const Entry& entry : out)
        for (const Json& variant : role_variants(table[role], where)) {
          for (const Json* r = &variant; r; r = r->contains("base") ? &r->at("base") : nullptr)
            at(where, [&] { registry_.find((*r)["name"].get<std::string>()); });
          wider.push_back(entry);
          wider.back().roles[role] = variant;
        }
      out = std::move(wider);
    }
    if (out.front().roles.empty())
      throw Error({"a strategy without a role", "select, evict or allocate", "none", document_.where(place), ""});
    return out;
  }

  void add_strategy(const Entry& entry) {
    Json roles = entry.roles;
    if (roles.contains("evict") && !roles["evict"].contains("cut") && !cut_.is_null()) roles["evict"]["cut"] = cut_;
    std::vector<Axis> axes;
    for (const auto& [role, table] : roles.items())
      at(document_.where(entry.place + "." + role), [&, &role = role, &table = table] {
        for (Axis& a : find_axes(registry_, table, role, document_, entry.place + "." + role))
          axes.push_back(std::move(a));
      });
    std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.path < b.path; });
    std::set<std::string> varied;
    for (const Axis& a : axes)
      if (a.values.size() > 1) varied.insert(a.path);
    for_each_combination(axes, [&](const std::vector<std::size_t>& at) {
      Json point = roles;
      for (std::size_t i = 0; i < axes.size(); ++i) assign(point, axes[i].path, axes[i].values[at[i]]);
      const std::string label =
          entry.label ? *entry.label + label_of_axes(point, varied) : label_of_cell(point, varied);
      for (const Json& budget : budgets_) add_point(point, budget, label, entry.place);
    });
  }

  void add_point(Json point, const Json& budget, const std::string& label, const std::string& place) {
    Cell cell;
    for (auto& [role, table] : point.items()) {
      add_budget(registry_, table, kind_of(role), budget);
      (role == "select"  ? cell.select
       : role == "evict" ? cell.evict
                         : cell.allocate) =
          resolve(registry_, table, document_.where(place + "." + role), directory_, kind_of(role));
    }
    cell.label = label;
    const std::string idle = why_not_shared(cell);
    const bool stochastic = is_stochastic(cell.select) || is_stochastic(cell.evict) || is_stochastic(cell.allocate);
    const Json exclusions = document_.root.value("exclude", Json::array());
    for (const std::uint64_t seed : seeds_) {
      if (!stochastic && seed != seeds_.front()) continue;
      cell.seed = seed;
      const Json described = cell.describe();
      if (std::any_of(exclusions.begin(), exclusions.end(), [&](const Json& e) { return excluded(described, e); }))
        continue;
      // Methods without a budget come round once for each default budget.
      if (!known_.insert(label + described.dump()).second) continue;
      if (!idle.empty())
        throw Error({"an allocator with nothing to share: " + idle, "beside it a strategy that ranks (role score)", "",
                     document_.where(place + ".allocate"), "Drop allocate there, or [[exclude]] the pair."});
      if (out_.cells.size() == kMostCells)
        throw Error({"too many cells", "at most " + std::to_string(kMostCells), "more", document_.where(place),
                     "Shorten an axis, or split the study."});
      out_.cells.push_back(cell);
    }
  }

  /// Runs f; an Error that names no place gets this one.
  template <class F>
  static void at(const std::string& where, F f) {
    try {
      f();
    } catch (const Error& e) {
      Problem problem = e.problem();
      if (problem.where.empty()) problem.where = where;
      throw Error(problem);
    }
  }

  TomlDocument document_;
  const Registry& registry_;
  const Overrides& overrides_;
  std::string directory_;
  Scenario out_;
  std::vector<std::uint64_t> seeds_;
  std::vector<Json> budgets_;
  Json cut_;
  std::set<std::string> known_;
};

}  // namespace

Cell make_cell(const Registry& registry, const Json& roles, std::uint64_t seed, const std::string& where,
               const std::string& directory) {
  Cell cell;
  cell.seed = seed;
  for (const auto& [role, table] : roles.items())
    (role == "select"  ? cell.select
     : role == "evict" ? cell.evict
                       : cell.allocate) = resolve(registry, table, where, directory, kind_of(role));
  cell.label = label_of_cell(roles, {});
  if (const std::string idle = why_not_shared(cell); !idle.empty())
    throw Error({"an allocator with nothing to share: " + idle, "beside it a strategy that ranks (role score)", "",
                 where, "Drop allocate, or choose another strategy."});
  return cell;
}

Scenario load_scenario(const std::string& path, const Registry& registry, const Overrides& overrides) {
  return Loader(path, registry, overrides).load();
}

}  // namespace lacuna
