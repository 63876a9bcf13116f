#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "lacuna/base/json.hpp"
#include "lacuna/strategy/registry.hpp"
#include "parameters.hpp"

namespace lacuna {
namespace {

const char kAnyGqa[] = "none|mean|max|sum|union", kEvictGqa[] = "mean|max|sum|union";

ParamSpec shared(const char* name, const char* doc, const char* type, const char* default_json, const char* range) {
  return {name, doc, type, default_json, range, false, true};
}

}  // namespace

const char* verb(RoleKind role) {
  return role == RoleKind::select ? "select" : role == RoleKind::evict ? "evict" : "allocate";
}

StrategyType::StrategyType(const sdk::Entry& entry, std::string library, std::string id)
    : entry_(entry), library_(std::move(library)), id_(std::move(id)) {
  for (int i = 0; i < entry.num_params; ++i) {
    const sdk::Param& p = entry.params[i];
    params_.push_back({p.name, p.doc, p.type, p.default_value, p.range, p.is_budget_knob != 0, false});
  }
  if (*entry.dense_point && !entry.takes_budget && !entry.wrapper)
    always_dense_ = parse_json(entry.dense_point, "dense_point", library_).empty();
  if (!can_select() && !can_evict()) return;
  const auto named = [this](const std::string& name) {
    return std::any_of(params_.begin(), params_.end(), [&](const ParamSpec& p) { return p.name == name; });
  };
  std::vector<ParamSpec> common = {
      can_select() ? shared("gqa", "how a group's query heads share a choice (eviction: mean unless given, never none)",
                            "string", "\"none\"", kAnyGqa)
                   : shared("gqa", "how a group's query heads share what is kept", "string", "\"mean\"", kEvictGqa),
      shared("dense_layers", "model layers left dense", "ints", "[]", "0.."),
      shared("sinks", "first tokens that are always taken, inside the budget", "int", "0", "0..2147483647"),
      shared("recent", "last tokens that are always taken, inside the budget", "int", "0", "0..2147483647")};
  if (can_evict()) {
    common.push_back(shared("cut", "where the prompt is evicted", "cut", "\"end\"", ""));
    common.push_back(shared("positions", "kept keys stay at their positions or are rotated to their slots", "string",
                            "\"original\"", "original|compacted"));
  }
  const auto defaults = parse_json(entry.defaults, "defaults", library_);
  for (ParamSpec& spec : common) {
    if (named(spec.name)) continue;
    if (defaults.contains(spec.name)) spec.default_json = defaults[spec.name].dump();
    params_.push_back(std::move(spec));
  }
}

std::vector<ParamSpec> StrategyType::params(RoleKind role) const {
  std::vector<ParamSpec> out;
  for (ParamSpec spec : params_) {
    const bool of_eviction = spec.name == "cut" || spec.name == "positions";
    if (spec.shared && (role == RoleKind::allocate || (role == RoleKind::select && of_eviction))) continue;
    if (spec.shared && spec.name == "gqa" && role == RoleKind::evict) {
      spec.range = kEvictGqa;
      if (spec.default_json == "\"none\"") spec.default_json = "\"mean\"";
    }
    out.push_back(std::move(spec));
  }
  return out;
}

std::vector<std::string> StrategyType::presets() const {
  std::vector<std::string> out;
  const auto all = parse_json(entry_.presets, "presets", library_);
  for (const auto& item : all.items()) out.push_back(item.key());
  return out;
}

std::string StrategyType::default_base() const {
  for (const ParamSpec& p : params_)
    if (p.type == "strategy" && p.default_json != "null") return p.default_json;
  return "";
}

bool StrategyType::can(RoleKind role) const {
  return role == RoleKind::select ? can_select() : role == RoleKind::evict ? can_evict() : can_allocate();
}

bool StrategyType::can_select() const {
  return (in_phase(sdk::kPrefill) || in_phase(sdk::kDecode)) && (entry_.score || entry_.mark || entry_.refine);
}

bool StrategyType::can_evict() const { return in_phase(sdk::kEvict) && (entry_.score || entry_.retain); }

bool StrategyType::can_allocate() const { return entry_.allocate_layers || entry_.allocate_rows; }

std::vector<std::string> StrategyType::roles() const {
  const std::pair<const char*, bool> all[] = {{"plan", entry_.plan != nullptr},
                                              {"index", entry_.index != nullptr},
                                              {"score", entry_.score != nullptr},
                                              {"mark", entry_.mark != nullptr},
                                              {"refine", entry_.refine != nullptr},
                                              {"allocate_layers", entry_.allocate_layers != nullptr},
                                              {"allocate_rows", entry_.allocate_rows != nullptr},
                                              {"retain", entry_.retain != nullptr},
                                              {"attended", entry_.attended != nullptr},
                                              {"rewrite", entry_.rewrite != nullptr},
                                              {"calibrate", entry_.calibrate != nullptr}};
  std::vector<std::string> out;
  for (const auto& [name, has] : all) {
    if (has) out.emplace_back(name);
  }
  return out;
}

}  // namespace lacuna
