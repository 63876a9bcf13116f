#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "lacuna/base/error.hpp"
#include "lacuna/base/json.hpp"
#include "lacuna/strategy/instance.hpp"
#include "parameters.hpp"

namespace lacuna {
namespace {

const char* const kWrapperOnly[] = {"dense_layers", "cut", "positions"};

bool is_wrapper_only(const std::string& name) {
  return std::find(std::begin(kWrapperOnly), std::end(kWrapperOnly), name) != std::end(kWrapperOnly);
}

std::vector<std::string> names_of(const std::vector<ParamSpec>& specs) {
  std::vector<std::string> out;
  for (const auto& spec : specs) out.push_back(spec.name);
  return out;
}

std::string joined(const std::vector<std::string>& names) { return fmt::format("{}", fmt::join(names, ", ")); }

class Resolver {
 public:
  Resolver(const Registry& registry, std::string where, std::string directory, RoleKind role, bool is_base)
      : registry_(registry), place_{"", std::move(where), std::move(directory)}, role_(role), is_base_(is_base) {}

  Resolved run(const Json& given) {
    table_ = given.is_string() ? Json{{"name", given}} : given;
    if (!table_.is_object() || !table_.contains("name") || !table_["name"].is_string()) {
      refuse("a strategy", "its name, or a table with a name", excerpt(given), "");
    }
    find_type();
    place_.owner = fmt::format("strategy '{}'", type_->name());
    for (ParamSpec& spec : type_->params(role_)) {
      if (spec.type != "strategy" && !(is_base_ && spec.shared && is_wrapper_only(spec.name)))
        specs_.push_back(std::move(spec));
    }
    const Json preset = preset_values();
    refuse_unknown();

    Resolved out;
    out.type = type_;
    out.own = Json::object();
    out.shared = Json::object();
    for (const ParamSpec& spec : specs_) (spec.shared ? out.shared : out.own)[spec.name] = value_of(spec, preset);
    check_together(type_->entry(), out.own, place_);
    read_data(out);
    if (role_ != RoleKind::allocate) out.budget = read_budget(table_, place_);
    if (calibrates()) turn_into_knob(out);
    if (type_->entry().wrapper) {
      if (const std::string base = type_->default_base(); !table_.contains("base") && !base.empty())
        table_["base"] = Json::parse(base);
      if (!table_.contains("base")) {
        refuse(place_.owner + " is a wrapper", "base, another strategy by name or table", "none",
               "Add base = \"...\".");
      }
      const std::string where = place_.where.empty() ? "base" : place_.where + ", base";
      out.base =
          std::make_shared<Resolved>(Resolver(registry_, where, place_.directory, role_, true).run(table_["base"]));
    }
    return out;
  }

 private:
  [[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& found,
                           const std::string& remedy) const {
    throw Error({what, expected, found, place_.where, remedy});
  }

  void find_type() {
    try {
      type_ = &registry_.find(table_["name"].get<std::string>());
    } catch (const Error& e) {
      Problem problem = e.problem();
      problem.where = place_.where;
      throw Error(problem);
    }
    if (type_->can(role_)) return;
    std::vector<std::string> able, uses;
    for (const auto* other : registry_.all()) {
      if (other->can(role_)) able.push_back(other->name());
    }
    for (const RoleKind use : {RoleKind::select, RoleKind::evict, RoleKind::allocate}) {
      if (type_->can(use)) uses.emplace_back(verb(use));
    }
    refuse(fmt::format("strategy '{}' cannot {}", type_->name(), verb(role_)),
           able.empty() ? fmt::format("a strategy that can {}", verb(role_)) : "one of " + joined(able),
           fmt::format("a strategy for: {}", joined(uses)), "");
  }

  Json preset_values() const {
    if (!table_.contains("preset")) return Json::object();
    const auto known = type_->presets();
    const Json& name = table_["preset"];
    if (known.empty()) refuse(place_.owner + " has no presets", "no preset", excerpt(name), "Remove preset.");
    if (!name.is_string() || std::find(known.begin(), known.end(), name.get<std::string>()) == known.end()) {
      refuse(place_.owner + ": unknown preset", joined(known), excerpt(name),
             name.is_string() ? near_name(name.get<std::string>(), known) : "");
    }
    return parse_json(type_->entry().presets, "presets", type_->library())[name.get<std::string>()];
  }

  bool calibrates() const {
    const Json given = table_.value("calibrate", Json(false));
    if (!given.is_boolean()) refuse(place_.owner + ": bad value of 'calibrate'", "true or false", excerpt(given), "");
    return given.get<bool>();
  }

  /// The density becomes what the strategy's knob is to realise.
  void turn_into_knob(Resolved& out) const {
    if (is_base_)
      refuse(place_.owner + ": calibrate = true in a base", "in the outer table, whose density it reaches", "base", "");
    const auto knob = std::find_if(specs_.begin(), specs_.end(), [](const ParamSpec& p) { return p.budget_knob; });
    if (role_ != RoleKind::select || knob == specs_.end())
      refuse(place_.owner + ": calibrate = true", "a select strategy with a budget knob", "none", "Remove calibrate.");
    if (out.budget.kind != BudgetSpec::Kind::density)
      refuse(place_.owner + ": calibrate = true without a density", "density = ...", "none", "");
    const KnobEnds ends = knob_ends(*knob);
    out.knob = BudgetKnob{knob->name,          ends.lo,          ends.hi,
                          knob->type == "int", out.budget.value, table_.value("calibrated_on", std::string())};
    out.budget = BudgetSpec{};
  }

  /// The files of the parameters of type data. `data_ids`, as describe() gives it, must name the same content.
  void read_data(Resolved& out) const {
    for (const ParamSpec& spec : specs_) {
      if (spec.type != "data") continue;
      const auto path = out.own[spec.name].get<std::string>();
      if (path.empty()) continue;
      auto file = std::make_shared<CalibrationFile>(read_calibration(path));
      const auto of = file->metadata.find("strategy");
      if (of != file->metadata.end() && of->second != type_->name())
        refuse(fmt::format("{}: '{}' names another strategy's calibration", place_.owner, spec.name), type_->name(),
               of->second, "Make one with lacuna calibrate " + type_->name() + ".");
      const Json named = table_.value("data_ids", Json::object()).value(spec.name, Json(file->content_id));
      if (named != file->content_id)
        refuse(fmt::format("{}: the file of '{}' has changed", place_.owner, spec.name), excerpt(named),
               file->content_id, "");
      out.data[spec.name] = std::move(file);
    }
  }

  void refuse_unknown() const {
    auto known = names_of(specs_);
    const bool takes_budget = role_ != RoleKind::allocate && (type_->entry().takes_budget || calibrates());
    for (const auto& item : table_.items()) {
      const std::string& key = item.key();
      if (key == "name" || key == "preset" || key == "data_ids" || key == "calibrated_on" || key == "calibrate" ||
          (key == "base" && type_->entry().wrapper))
        continue;
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      if (is_budget_key(key) && takes_budget) continue;
      if (const std::string reason = why_not(key); !reason.empty()) {
        refuse(fmt::format("{}: '{}' does not apply", place_.owner, key), "", "", reason);
      }
      if (!type_->presets().empty()) known.emplace_back("preset");
      if (takes_budget) known.insert(known.end(), budget_keys().begin(), budget_keys().end());
      refuse(fmt::format("{}: unknown parameter '{}'", place_.owner, key), "", "", suggestion(key, known));
    }
    if (table_.contains("shape") && !(role_ == RoleKind::select && type_->in_phase(sdk::kPrefill))) {
      refuse(place_.owner + ": 'shape' does not apply", "", "",
             "It spreads a density over the tiles of prefill selection.");
    }
  }

  /// Why a name that Lacuna knows cannot stand here; "" for one that it does not know.
  std::string why_not(const std::string& key) const {
    if (key == "base") return "Only wrappers have a base.";
    if (is_budget_key(key)) {
      if (role_ == RoleKind::allocate)
        return "An allocator shares out the budget of the strategy that it serves: give it there.";
      std::vector<std::string> knobs;
      for (const auto& spec : specs_) {
        if (spec.budget_knob) knobs.push_back(spec.name);
      }
      return "It takes no budget" +
             (knobs.empty() ? std::string(", only its parameters.") : ": its knob is " + joined(knobs) + ".");
    }
    if (is_base_ && is_wrapper_only(key)) return "Give it in the wrapper's table, outside base.";
    if (role_ == RoleKind::select && (key == "cut" || key == "positions")) return "It belongs to eviction.";
    return "";
  }

  Json value_of(const ParamSpec& spec, const Json& preset) const {
    const bool is_given = table_.contains(spec.name), is_preset = preset.contains(spec.name);
    Json value = is_given ? table_[spec.name] : is_preset ? preset[spec.name] : Json::parse(spec.default_json);
    if (role_ == RoleKind::evict && spec.name == "gqa" && value == "none") {
      refuse(place_.owner + ": gqa = none in eviction", spec.range, is_given ? "\"none\"" : "\"none\" in the preset",
             "Pages belong to KV heads, so that a group's query heads must agree on what is kept.");
    }
    value = canonical_value(spec, value, place_);
    if (spec.name == "dense_layers") {  // a set: [1, 0, 0] is [0, 1]
      std::sort(value.begin(), value.end());
      value.erase(std::unique(value.begin(), value.end()), value.end());
    }
    return value;
  }

  const Registry& registry_;
  Place place_;
  RoleKind role_;
  bool is_base_;
  Json table_;
  const StrategyType* type_ = nullptr;
  std::vector<ParamSpec> specs_;
};

sdk::Gqa gqa_of(const std::string& name) {
  if (name == "mean") return sdk::Gqa::mean;
  if (name == "max") return sdk::Gqa::max;
  if (name == "sum") return sdk::Gqa::sum;
  return name == "union" ? sdk::Gqa::union_ : sdk::Gqa::none;
}

}  // namespace

Resolved resolve(const Registry& registry, const Json& given, const std::string& where, const std::string& directory,
                 RoleKind role) {
  return Resolver(registry, where, directory, role, false).run(given);
}

sdk::Common Resolved::common() const {
  sdk::Common out;
  if (shared.contains("gqa")) out.gqa = gqa_of(shared["gqa"].get<std::string>());
  out.sinks = shared.value("sinks", 0);
  out.recent = shared.value("recent", 0);
  return out;
}

std::vector<int> Resolved::dense_layers() const { return shared.value("dense_layers", std::vector<int>{}); }
bool Resolved::keeps_dense(int layer) const {
  const std::vector<int> layers = dense_layers();
  return std::find(layers.begin(), layers.end(), layer) != layers.end();
}

Json Resolved::describe() const {
  Json out = {{"name", type->name()}};
  out.update(own);
  out.update(shared);
  switch (budget.kind) {
    case BudgetSpec::Kind::none: break;
    case BudgetSpec::Kind::density: out["density"] = budget.value; break;
    case BudgetSpec::Kind::tokens: out["tokens"] = static_cast<sdk::i64>(budget.value); break;
    case BudgetSpec::Kind::units: out["units"] = static_cast<sdk::i64>(budget.value); break;
    case BudgetSpec::Kind::mass: out["mass"] = budget.value; break;
  }
  if (budget.proportional) out["shape"] = "proportional";
  if (knob) {
    out["density"] = knob->density;
    out["calibrate"] = true;
    out["calibrated_on"] = knob->calibrated_on;
  }
  for (const auto& [name, file] : data) out["data_ids"][name] = file->content_id;
  if (base) out["base"] = base->describe();
  return out;
}

}  // namespace lacuna
