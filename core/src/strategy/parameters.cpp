#include "parameters.hpp"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>

#include "lacuna/base/error.hpp"
#include "lacuna/base/json.hpp"

namespace lacuna {
namespace {

struct Interval {
  std::optional<double> lo, hi;
  bool lo_open = false, hi_open = false;  // the end itself is excluded

  bool holds(double v) const {
    return (!lo || (lo_open ? v > *lo : v >= *lo)) && (!hi || (hi_open ? v < *hi : v <= *hi));
  }
};

std::optional<double> number(const std::string& text) {
  double out = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (code != std::errc{} || end != text.data() + text.size() || !std::isfinite(out)) return std::nullopt;
  return out;
}

/// Nothing for a text that is not "lo..hi", "lo<..hi" or "lo..<hi", or holds no number.
std::optional<Interval> interval(const std::string& range) {
  if (range.empty()) return Interval{};
  const auto dots = range.find("..");
  if (dots == std::string::npos) return std::nullopt;
  std::string lo = range.substr(0, dots), hi = range.substr(dots + 2);
  Interval out;
  out.lo_open = lo.ends_with('<');
  out.hi_open = hi.starts_with('<');
  if (out.lo_open) lo.pop_back();
  if (out.hi_open) hi.erase(0, 1);
  out.lo = number(lo);
  out.hi = number(hi);
  if (((out.lo_open || !lo.empty()) && !out.lo) || ((out.hi_open || !hi.empty()) && !out.hi)) return std::nullopt;
  const bool open = out.lo_open || out.hi_open;
  if (out.lo && out.hi && (open ? *out.lo >= *out.hi : *out.lo > *out.hi)) return std::nullopt;
  return out;
}

std::vector<std::string> choices(const std::string& range) {
  std::vector<std::string> out;
  for (std::size_t begin = 0; !range.empty();) {
    const auto bar = range.find('|', begin);
    out.push_back(range.substr(begin, bar - begin));
    if (bar == std::string::npos) break;
    begin = bar + 1;
  }
  return out;
}

[[noreturn]] void refuse(const ParamSpec& spec, const std::string& expected, const std::string& found,
                         const Place& place, const std::string& remedy = "") {
  throw Error({fmt::format("{}: bad value of '{}' ({})", place.owner, spec.name, spec.doc), expected, found,
               place.where, remedy});
}

bool fits_int64(const Json& value) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() ||
          value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
}

bool fits_int32(const Json& value) {
  return fits_int64(value) && value.get<std::int64_t>() >= std::numeric_limits<std::int32_t>::min() &&
         value.get<std::int64_t>() <= std::numeric_limits<std::int32_t>::max();
}

std::string checked_text(const ParamSpec& spec, const Json& value, const Place& place) {
  if (!value.is_string()) refuse(spec, expectation(spec), excerpt(value), place);
  const auto text = value.get<std::string>();
  // Plug-ins read strings without unescaping, so what JSON would escape cannot pass.
  const bool plain =
      std::none_of(text.begin(), text.end(), [](unsigned char c) { return c == '"' || c == '\\' || c < 0x20; });
  if (!plain) refuse(spec, "text without quotes, backslashes and control characters", excerpt(value), place);
  return text;
}

/// Heads of one layer of a class table, ascending.
Json heads_of(const ParamSpec& spec, const std::string& layer, const Json& heads, const Place& place) {
  if (!heads.is_array()) refuse(spec, fmt::format("a list of KV heads for layer {}", layer), excerpt(heads), place);
  std::set<std::int64_t> out;
  for (const Json& head : heads) {
    if (!fits_int32(head) || head.get<std::int64_t>() < 0) {
      refuse(spec, fmt::format("KV heads >= 0 for layer {}", layer), excerpt(head), place);
    }
    out.insert(head.get<std::int64_t>());
  }
  return Json(out);
}

/// {"layer": {"3": {"full": [0, 2]}}} or {"3": [0, 2]}.
Json class_table(const ParamSpec& spec, const Json& given, const Place& place) {
  if (!given.is_object())
    refuse(spec, "a class table, or the name of a TOML file that holds one", excerpt(given), place);
  const bool canonical = !given.contains("layer");
  std::map<int, Json> layers;
  for (const auto& [key, value] : (canonical ? given : given["layer"]).items()) {
    int layer = -1;
    const auto [end, code] = std::from_chars(key.data(), key.data() + key.size(), layer);
    if (code != std::errc{} || end != key.data() + key.size() || layer < 0) {
      refuse(spec, "layers by number, [layer.3] full = [0, 2]", fmt::format("'{}'", key), place);
    }
    if (!canonical) {
      if (!value.is_object() || !value.contains("full") || value.size() != 1) {
        refuse(spec, fmt::format("full = [...] alone in layer {}", layer), excerpt(value), place);
      }
    }
    if (!layers.emplace(layer, heads_of(spec, key, canonical ? value : value["full"], place)).second) {
      refuse(spec, "each layer once", fmt::format("layer {} twice", layer), place);
    }
  }
  for (const auto& item : given.items()) {
    if (!canonical && item.key() != "layer")
      refuse(spec, "'layer' alone at the top", fmt::format("'{}'", item.key()), place);
  }
  Json out = Json::object();
  for (const auto& [layer, heads] : layers) out[std::to_string(layer)] = heads;
  return out;
}

Json class_table_file(const ParamSpec& spec, const std::string& file, const Place& place) {
  const auto path = std::filesystem::path(place.directory) / file;  // an absolute name stays itself
  if (!std::filesystem::is_regular_file(path))
    refuse(spec, "a TOML file with a class table", fmt::format("no file {}", path.string()), place);
  toml::table table;
  try {
    table = toml::parse_file(path.string());
  } catch (const toml::parse_error& e) {
    const auto begin = e.source().begin;
    throw Error({fmt::format("{}: the class table of '{}' is not TOML", place.owner, spec.name), "",
                 std::string(e.description()), fmt::format("{}:{}:{}", path.string(), begin.line, begin.column), ""});
  }
  Json json = Json::object();
  if (const auto* layers = table["layer"].as_table()) {
    json["layer"] = Json::object();
    for (const auto& [layer, classes] : *layers) {
      Json& out = json["layer"][std::string(layer.str())] = Json::object();
      if (const auto* named = classes.as_table()) {
        for (const auto& [name, heads] : *named) {
          Json& list = out[std::string(name.str())] = Json::array();
          if (const auto* array = heads.as_array()) {
            for (const auto& head : *array) list.push_back(head.value_exact<std::int64_t>().value_or(-1));
          }
        }
      }
    }
  }
  for (const auto& [key, node] : table) {
    if (key.str() != "layer") json[std::string(key.str())] = nullptr;
  }
  if (!json.contains("layer")) refuse(spec, "[layer.N] tables", fmt::format("none in {}", path.string()), place);
  return class_table(spec, json, {place.owner, path.string(), place.directory});
}

Json canonical_number(const ParamSpec& spec, const Json& value, const Place& place) {
  const bool whole = spec.type == "int";
  if (whole ? !fits_int64(value) : !value.is_number()) refuse(spec, expectation(spec), excerpt(value), place);
  const double v = value.get<double>();
  if (!std::isfinite(v)) refuse(spec, expectation(spec), "a number that is not finite", place);
  if (!interval(spec.range)->holds(v)) refuse(spec, expectation(spec), excerpt(value), place);
  return whole ? Json(value.get<std::int64_t>()) : Json(v);
}

}  // namespace

std::string expectation(const ParamSpec& spec) {
  if (spec.type == "cut") return "\"end\", \"before_question\" or a number of tokens >= 1";
  if (spec.type == "string" && !spec.range.empty()) return spec.range;
  const std::string type = spec.type == "int"     ? "a whole number"
                           : spec.type == "ints"  ? "a list of whole numbers"
                           : spec.type == "float" ? "a number"
                           : spec.type == "bool"  ? "true or false"
                                                  : spec.type;
  const std::string range = range_text(spec);
  if (range.empty()) return type;
  const bool relation = range[0] == '<' || range[0] == '>';
  return relation ? fmt::format("{} {}", type, range) : fmt::format("{} in {}", type, range);
}

std::vector<std::string> constraint_names(const sdk::Constraint& constraint) {
  std::vector<std::string> out;
  const std::string names = constraint.names;
  for (std::size_t begin = 0; begin < names.size();) {
    const std::size_t end = std::min(names.find(',', begin), names.size());
    out.push_back(names.substr(begin, end - begin));
    begin = names.find_first_not_of(", ", end);
  }
  return out;
}

void check_together(const sdk::Entry& entry, const Json& own, const Place& place) {
  if (entry.num_constraints == 0) return;
  sdk::Error error{};
  sdk::i32 broken = -1;
  if (entry.check(own.dump().c_str(), &broken, &error) != 0)
    throw Error({fmt::format("{}: its check failed: {}", place.owner,
                             std::string(error.text, strnlen(error.text, sizeof error.text))),
                 "", "", place.where, ""});
  if (broken < 0 || broken >= entry.num_constraints) return;
  const sdk::Constraint& constraint = entry.constraints[broken];
  std::string found;
  for (const std::string& name : constraint_names(constraint))
    found += fmt::format("{}{} = {}", found.empty() ? "" : ", ", name, own[name].dump());
  throw Error({place.owner + ": parameters that do not go together", constraint.text, found, place.where, ""});
}

std::string range_text(const ParamSpec& spec) {
  const auto in = spec.range.find("..") == std::string::npos ? std::nullopt : interval(spec.range);
  if (!in) return spec.range;
  const auto dots = spec.range.find("..");
  const std::string lo = spec.range.substr(0, dots - (in->lo_open ? 1 : 0)),
                    hi = spec.range.substr(dots + (in->hi_open ? 3 : 2));
  if (in->lo && in->hi && !in->lo_open && !in->hi_open) return spec.range;
  if (in->lo && in->hi) return fmt::format("{}{}, {}{}", in->lo_open ? '(' : '[', lo, hi, in->hi_open ? ')' : ']');
  if (in->lo) return fmt::format("{} {}", in->lo_open ? ">" : ">=", lo);
  return in->hi ? fmt::format("{} {}", in->hi_open ? "<" : "<=", hi) : "";
}

KnobEnds knob_ends(const ParamSpec& knob) {
  constexpr double kInside = 1e-6, kFar = 4096;
  const Interval in = *interval(knob.range);
  const double usual = std::max(Json::parse(knob.default_json).get<double>(), 1.0);
  const double step = knob.type == "int" ? 1 : kInside;
  // A closed end that is the default switches the knob off: it is another method.
  const bool off = in.lo && *in.lo == Json::parse(knob.default_json).get<double>();
  return {in.lo.value_or(0) + (in.lo_open || off ? step : 0), in.hi ? *in.hi - (in.hi_open ? step : 0) : kFar * usual};
}

std::string near_name(const std::string& name, const std::vector<std::string>& known) {
  return nearest(name, known).empty() ? "" : suggestion(name, known);
}

std::string range_fault(const ParamSpec& spec) {
  static const std::set<std::string> kNumbers = {"int", "float", "ints"},
                                     kOthers = {"bool", "classes", "data", "strategy"};
  if (kNumbers.contains(spec.type))
    return interval(spec.range) ? "" : fmt::format("range '{}' is not lo..hi, lo<..hi or lo..<hi", spec.range);
  if (kOthers.contains(spec.type)) return spec.range.empty() ? "" : fmt::format("type {} takes no range", spec.type);
  if (spec.type != "string") return fmt::format("unknown type '{}'", spec.type);
  const auto listed = choices(spec.range);
  const bool named = std::none_of(listed.begin(), listed.end(), [](const std::string& c) { return c.empty(); });
  return named ? "" : fmt::format("range '{}' lists an empty choice", spec.range);
}

Json canonical_value(const ParamSpec& spec, const Json& value, const Place& place) {
  if (spec.type == "int" || spec.type == "float") return canonical_number(spec, value, place);
  if (spec.type == "bool") {
    if (!value.is_boolean()) refuse(spec, expectation(spec), excerpt(value), place);
    return value;
  }
  if (spec.type == "string") {
    const std::string text = checked_text(spec, value, place);
    const auto listed = choices(spec.range);
    if (!listed.empty() && std::find(listed.begin(), listed.end(), text) == listed.end()) {
      refuse(spec, expectation(spec), fmt::format("\"{}\"", text), place, near_name(text, listed));
    }
    return text;
  }
  if (spec.type == "ints") {
    if (!value.is_array()) refuse(spec, expectation(spec), excerpt(value), place);
    Json out = Json::array();
    for (const Json& item : value) {
      if (!fits_int32(item) || !interval(spec.range)->holds(item.get<double>()))
        refuse(spec, expectation(spec), excerpt(item), place);
      out.push_back(item.get<std::int64_t>());
    }
    return out;
  }
  if (spec.type == "classes") {
    return value.is_string() ? class_table_file(spec, checked_text(spec, value, place), place)
                             : class_table(spec, value, place);
  }
  if (spec.type == "data") {
    const std::string file = checked_text(spec, value, place);
    return file.empty() ? file : (std::filesystem::path(place.directory) / file).lexically_normal().string();
  }
  // cut
  if (value.is_string() && (value == "end" || value == "before_question")) return value;
  if (!fits_int64(value) || value.get<std::int64_t>() < 1) refuse(spec, expectation(spec), excerpt(value), place);
  return value.get<std::int64_t>();
}

const std::vector<std::string>& budget_keys() {
  static const std::vector<std::string> keys = {"density", "tokens", "units", "mass", "shape"};
  return keys;
}

bool is_budget_key(const std::string& name) {
  return std::find(budget_keys().begin(), budget_keys().end(), name) != budget_keys().end();
}

BudgetSpec read_budget(const Json& table, const Place& place) {
  using Kind = BudgetSpec::Kind;
  static const struct {
    Kind kind;
    ParamSpec spec;
  } kKinds[] = {{Kind::density, {"density", "share of the tokens or pairs that may be used", "float", "", "0<..1"}},
                {Kind::tokens, {"tokens", "tokens of a row", "int", "", "1.."}},
                {Kind::units, {"units", "ranked units of a row", "int", "", "1.."}},
                {Kind::mass, {"mass", "share of a row's mass to reach", "float", "", "0<..1"}}};
  static const ParamSpec kShape = {"shape", "how a prefill density is spread over the tiles", "string", "",
                                   "constant|proportional"};
  BudgetSpec out;
  std::string first;
  for (const auto& [kind, spec] : kKinds) {
    if (!table.contains(spec.name)) continue;
    if (!first.empty()) {
      throw Error({place.owner + ": two budgets", "one of density, tokens, units and mass",
                   fmt::format("{} and {}", first, spec.name), place.where, "Remove one of them."});
    }
    first = spec.name;
    out.value = canonical_value(spec, table[spec.name], place).get<double>();
    out.kind = kind;
  }
  if (!table.contains("shape")) return out;
  if (out.kind != Kind::density && out.kind != Kind::none) {
    throw Error(
        {place.owner + ": 'shape' without a density", "shape beside a density", first, place.where, "Remove shape."});
  }
  out.proportional = canonical_value(kShape, table["shape"], place) == "proportional";
  return out;
}

const std::vector<std::string>& reserved_names() {
  static const std::vector<std::string> names = {"name", "preset",    "base",     "gqa",       "dense_layers",
                                                 "cut",  "positions", "density",  "tokens",    "units",
                                                 "mass", "shape",     "data_ids", "calibrate", "calibrated_on"};
  return names;
}

}  // namespace lacuna
