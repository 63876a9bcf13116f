#include "descriptor.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/base/json.hpp"
#include "parameters.hpp"

namespace lacuna {
namespace {

const char kRebuild[] = "Rebuild it against the headers of this Lacuna.";

/// Bytes of an Entry in a plug-in of that minor.
std::size_t entry_bytes(int abi_minor) {
  return abi_minor == 0   ? offsetof(sdk::Entry, constraints)
         : abi_minor == 1 ? offsetof(sdk::Entry, needs)
                          : sizeof(sdk::Entry);
}

bool is_name(const char* text) {
  if (!text || *text < 'a' || *text > 'z') return false;
  return std::all_of(text, text + std::string_view(text).size(),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; });
}

/// One strategy of a plug-in under examination.
class EntryCheck {
 public:
  EntryCheck(const sdk::Entry& entry, const std::string& library)
      : entry_(entry), place_{fmt::format("strategy '{}'", entry.name), library, ""}, type_(nullptr) {}

  void run() {
    for (const char* text :
         {entry_.summary, entry_.paper, entry_.rule, entry_.defaults, entry_.presets, entry_.dense_point}) {
      if (!text) refuse("a text of its Info is null", "all six texts", "");
    }
    if (!entry_.create || !entry_.destroy) refuse("create or destroy is null", "both", "");
    check_own_parameters();
    const auto defaults = object(entry_.defaults, "defaults");
    const StrategyType type(entry_, place_.where, "");
    type_ = &type;
    if (!type.can_select() && !type.can_evict() && !type.can_allocate()) {
      refuse(
          "it can do nothing",
          "score, mark or refine with phase prefill or decode, score or retain with phase evict, or an allocate role",
          fmt::format("phases {} and {}", entry_.phases,
                      type.roles().empty() ? "no role" : fmt::format("roles {}", list(type.roles()))));
    }
    check_defaults(defaults);
    check_presets();
    check_constraints();
    check_dense_point();
  }

 private:
  [[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& found) const {
    throw Error({place_.owner + ": " + what, expected, found, place_.where, ""});
  }
  static std::string list(const std::vector<std::string>& names) {
    std::string out;
    for (const auto& name : names) out += (out.empty() ? "" : ", ") + name;
    return out;
  }
  nlohmann::json object(const char* text, const std::string& what) const {
    auto out = parse_json(text, place_.owner + ": " + what, place_.where);
    if (!out.is_object()) refuse(what + " is not an object", "a JSON object", excerpt(out));
    return out;
  }
  const ParamSpec& spec(const std::string& name, const std::string& what, bool shared_only) const {
    std::vector<std::string> known;
    for (const ParamSpec& p : type_->params()) {
      if (p.name == name && (p.shared || !shared_only)) return p;
      if (p.shared || !shared_only) known.push_back(p.name);
    }
    refuse(fmt::format("{} names '{}'", what, name), shared_only ? "a shared parameter" : "a parameter",
           suggestion(name, known));
  }

  void check_own_parameters() {
    if (entry_.num_params < 0 || (entry_.num_params > 0 && !entry_.params))
      refuse("its parameter table is null", "", "");
    std::set<std::string> names;
    for (int i = 0; i < entry_.num_params; ++i) {
      const sdk::Param& p = entry_.params[i];
      for (const char* text : {p.name, p.doc, p.type, p.default_value, p.range}) {
        if (!text) refuse(fmt::format("a text of parameter {} is null", i + 1), "all five texts", "");
      }
      if (!is_name(p.name))
        refuse("a parameter's name", "lower-case letters, digits and _", fmt::format("'{}'", p.name));
      if (!names.insert(p.name).second) refuse(fmt::format("parameter '{}' is declared twice", p.name), "", "");
      const ParamSpec own{p.name, p.doc, p.type, p.default_value, p.range, false, false};
      if (const auto fault = range_fault(own); !fault.empty()) refuse(fmt::format("parameter '{}'", p.name), "", fault);
      if (own.type == "strategy") {
        if (own.name != "base" || !entry_.wrapper) {
          refuse(fmt::format("parameter '{}' is a strategy", p.name), "'base' of a wrapper alone", "");
        }
        const auto base = parse_json(p.default_value, place_.owner + ": default of 'base'", place_.where);
        if (!base.is_null() && !(base.is_object() && base.contains("name") && base["name"].is_string()))
          refuse("default of 'base'", "null, or a role table with a name", excerpt(base));
        continue;
      }
      const auto& reserved = reserved_names();
      if (std::find(reserved.begin(), reserved.end(), own.name) != reserved.end()) {
        refuse(fmt::format("parameter '{}' is the core's own", p.name), "another name", "");
      }
      const std::string what = fmt::format("{}: default of '{}'", place_.owner, p.name);
      const auto value = parse_json(p.default_value, what, place_.where);
      canonical_value(own, value, {what, place_.where, ""});
    }
  }

  void check_constraints() const {
    if (entry_.num_constraints < 0 || (entry_.num_constraints > 0 && (!entry_.constraints || !entry_.check)))
      refuse("its constraints are null", "a table and check", "");
    nlohmann::ordered_json values = nlohmann::ordered_json::object();
    for (int i = 0; i < entry_.num_params; ++i) {
      const sdk::Param& p = entry_.params[i];
      if (std::string_view(p.type) != "strategy") values[p.name] = nlohmann::ordered_json::parse(p.default_value);
    }
    for (int i = 0; i < entry_.num_constraints; ++i) {
      const sdk::Constraint& c = entry_.constraints[i];
      if (!c.text || !c.names) refuse(fmt::format("a text of constraint {} is null", i + 1), "both texts", "");
      for (const std::string& name : constraint_names(c))
        if (!values.contains(name))
          refuse(fmt::format("constraint '{}' is about '{}'", c.text, name), "a parameter", "");
    }
    check_together(entry_, values, {place_.owner + ": defaults", place_.where, ""});
    const auto presets = object(entry_.presets, "presets");
    for (const auto& [name, preset] : presets.items()) {
      nlohmann::ordered_json changed = values;
      for (const auto& [key, value] : preset.items())
        if (values.contains(key)) changed[key] = value;
      check_together(entry_, changed, {fmt::format("{}: preset '{}'", place_.owner, name), place_.where, ""});
    }
  }

  void check_defaults(const nlohmann::json& defaults) const {
    for (const auto& [key, value] : defaults.items()) {
      canonical_value(spec(key, "defaults", true), value, {place_.owner + ": defaults", place_.where, ""});
    }
  }

  void check_presets() const {
    const auto presets = object(entry_.presets, "presets");
    for (const auto& [name, values] : presets.items()) {
      const std::string what = fmt::format("preset '{}'", name);
      if (!values.is_object()) refuse(what + " is not an object", "{parameter: value}", excerpt(values));
      for (const auto& [key, value] : values.items()) {
        canonical_value(spec(key, what, false), value, {place_.owner + ": " + what, place_.where, ""});
      }
    }
  }

  void check_dense_point() const {
    if (!*entry_.dense_point) return;
    const Place place{place_.owner + ": dense_point", place_.where, ""};
    const auto point = object(entry_.dense_point, "dense_point");
    for (const auto& [key, value] : point.items()) {
      if (is_budget_key(key) || (key == "base" && entry_.wrapper)) continue;
      canonical_value(spec(key, "dense_point", false), value, place);
    }
    read_budget(point, place);
  }

  const sdk::Entry& entry_;
  const Place place_;
  const StrategyType* type_;
};

}  // namespace

void check_descriptor(const sdk::Descriptor& d, const std::string& library) {
  if (d.magic != sdk::kMagic) {
    throw Error({"not a Lacuna plug-in", fmt::format("magic {:#018x} behind 'lacuna_plugin'", sdk::kMagic),
                 fmt::format("{:#018x}", d.magic), library, "Export it with LACUNA_PLUGIN(...)."});
  }
  if (d.abi_major != sdk::kAbiMajor || d.abi_minor < 0 || d.abi_minor > sdk::kAbiMinor) {
    throw Error({"the plug-in has another ABI", fmt::format("ABI {}.{}", sdk::kAbiMajor, sdk::kAbiMinor),
                 fmt::format("ABI {}.{}", d.abi_major, d.abi_minor), library, kRebuild});
  }
  const std::size_t entry_size = entry_bytes(d.abi_minor);
  if (d.bytes != static_cast<sdk::i32>(sizeof(sdk::Descriptor)) || d.entry_bytes != static_cast<sdk::i32>(entry_size)) {
    throw Error({"the plug-in's structs have other sizes",
                 fmt::format("Descriptor {}, Entry {} bytes", sizeof(sdk::Descriptor), entry_size),
                 fmt::format("{} and {} (SDK {})", d.bytes, d.entry_bytes, d.sdk_version ? d.sdk_version : "unknown"),
                 library, kRebuild});
  }
  if (!d.cxx_runtime || std::string_view(d.cxx_runtime) != sdk::kCxxRuntime) {
    throw Error({"the plug-in was built for another C++ runtime", sdk::kCxxRuntime,
                 d.cxx_runtime ? d.cxx_runtime : "none", library, "Rebuild it with the same standard library."});
  }
  if (d.num_entries < 1 || !d.entries) {
    throw Error({"the plug-in holds no strategy", "at least one", "none", library, "Name them in LACUNA_PLUGIN(...)."});
  }
  for (int i = 0; i < d.num_entries; ++i) {
    const std::string which = fmt::format("strategy {} of {} in the plug-in", i + 1, d.num_entries);
    const sdk::Entry* entry = d.entries[i];
    if (!entry) {
      throw Error({which + " is null", "a table made by LACUNA_PLUGIN", "none", library,
                   "Its info(), schema() or the constructor of its Params may have thrown."});
    }
    if (entry->bytes != static_cast<sdk::i32>(entry_size)) {
      throw Error({which + " has another size", fmt::format("{} bytes", entry_size), fmt::format("{}", entry->bytes),
                   library, kRebuild});
    }
    if (!is_name(entry->name)) {
      throw Error({which + " has no usable name", "lower-case letters, digits and _",
                   entry->name ? fmt::format("'{}'", entry->name) : "null", library, ""});
    }
  }
}

sdk::Entry whole_entry(const sdk::Entry& entry, int abi_minor) {
  sdk::Entry out{};
  std::memcpy(&out, &entry, entry_bytes(abi_minor));
  if (!out.cost) out.cost = "";
  return out;
}

void check_entry(const sdk::Entry& entry, const std::string& library) { EntryCheck(entry, library).run(); }

}  // namespace lacuna
