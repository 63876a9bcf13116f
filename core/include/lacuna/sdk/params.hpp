// Typed parameters. A strategy declares each one once, in `static void schema(Schema<Params>&)`; the core validates,
// documents, lists and hashes from that, and hands the resolved values back as one flat JSON object, parsed here.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// One parameter as the core sees it. `type`: int | float | bool | string | ints | classes | data | strategy. `range`:
/// for numbers "lo..hi", where either end may be missing (unbounded) and a `<` beside the dots excludes an end
/// ("0<..1"); for strings "a|b|c"; or empty.
struct Param {
  const char *name, *doc, *type, *default_value, *range;
  i32 is_budget_knob;
};

/// A condition on parameters that their ranges cannot say. `text` says it ("block is a multiple of stride"); `names`
/// lists the parameters that it is about, separated by commas.
struct Constraint {
  const char *text, *names;
};

/// A list of whole numbers (dense_layers, select_layers, ...).
using Ints = std::vector<i32>;
/// KV heads by model layer, from a class table: TOML `[layer.3] full = [0, 2]`.
using Classes = std::map<i32, std::vector<i32>>;
/// Named arrays by model layer, from a calibration file (.safetensors, or TOML: `[layer.3] name = [...]`): the file's
/// name, or "" for none. The arrays are had by Context::data(); strategies that implement calibrate() write them.
struct Data {
  std::string file;
  bool given() const { return !file.empty(); }
};
/// The name of another strategy, owned by the core (wrappers): only its presence matters to the plug-in. `by_default`:
/// the role table that stands in where none is given, as JSON ({"name": ..., "density": ...}); "null": one must be.
struct Base {
  const char* by_default = "null";
};

namespace detail {

inline std::string json_number(double v) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.17g", v);
  for (int digits = 1; digits < 17; ++digits) {  // the shortest text that reads back equal
    char shorter[40];
    std::snprintf(shorter, sizeof shorter, "%.*g", digits, v);
    if (std::strtod(shorter, nullptr) == v) return shorter;
  }
  return buffer;
}
inline std::string to_json(i32 v) { return std::to_string(v); }
inline std::string to_json(i64 v) { return std::to_string(v); }
inline std::string to_json(double v) { return json_number(v); }
inline std::string to_json(bool v) { return v ? "true" : "false"; }
inline std::string to_json(const std::string& v) { return "\"" + v + "\""; }
inline std::string to_json(const Ints& v) {
  std::string out = "[";
  for (const i32 item : v) {
    if (out.size() > 1) out += ',';
    out += std::to_string(item);
  }
  return out + "]";
}
inline std::string to_json(const Classes& v) {
  std::string out = "{";
  for (const auto& [layer, heads] : v) {
    if (out.size() > 1) out += ',';
    out += to_json(std::to_string(layer));
    out += ':';
    out += to_json(heads);
  }
  return out + "}";
}
inline std::string to_json(const Data& v) { return to_json(v.file); }
inline std::string to_json(const Base& v) { return v.by_default; }

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, bool>)
    return "bool";
  else if constexpr (std::is_integral_v<T>)
    return "int";
  else if constexpr (std::is_floating_point_v<T>)
    return "float";
  else if constexpr (std::is_same_v<T, std::string>)
    return "string";
  else if constexpr (std::is_same_v<T, Ints>)
    return "ints";
  else if constexpr (std::is_same_v<T, Classes>)
    return "classes";
  else if constexpr (std::is_same_v<T, Data>)
    return "data";
  else
    return "strategy";
}

/// Splits one flat JSON object written by the core (no escapes, no nesting but lists and class tables) into its
/// members.
inline std::map<std::string, std::string> json_members(const char* text) {
  std::map<std::string, std::string> out;
  const char* p = text;
  auto skip = [&] {
    while (*p == ' ' || *p == ',' || *p == '\n') ++p;
  };
  if (*p != '{') throw Failure("resolved parameters are not a JSON object");
  for (++p, skip(); *p && *p != '}'; skip()) {
    const char* begin = ++p;
    while (*p && *p != '"') ++p;
    std::string key(begin, p);
    while (*p && *p != ':') ++p;
    for (++p; *p == ' ';) ++p;
    begin = p;
    int depth = 0;
    for (bool quoted = false; *p; ++p) {
      if (*p == '"') quoted = !quoted;
      if (quoted) continue;
      if (*p == '[' || *p == '{') ++depth;
      if ((*p == ',' || *p == '}') && depth == 0) break;
      if (*p == ']' || *p == '}') --depth;
    }
    out[key] = std::string(begin, p);
  }
  return out;
}
inline Ints parse_ints(const std::string& s) {
  Ints out;
  for (const char* p = s.c_str(); *p;) {
    if (*p == '-' || (*p >= '0' && *p <= '9')) {
      char* end;
      out.push_back(static_cast<i32>(std::strtol(p, &end, 10)));
      p = end;
    } else
      ++p;
  }
  return out;
}
inline void parse(const std::string& s, i32& v) {  // the core knows whole numbers of 64 bits only
  const long long wide = std::strtoll(s.c_str(), nullptr, 10);
  v = static_cast<i32>(wide);
  if (v != wide) throw Failure("the parameter's value " + s + " does not fit 32 bits");
}
inline void parse(const std::string& s, i64& v) { v = std::strtoll(s.c_str(), nullptr, 10); }
inline void parse(const std::string& s, double& v) { v = std::strtod(s.c_str(), nullptr); }
inline void parse(const std::string& s, bool& v) { v = s == "true"; }
inline void parse(const std::string& s, std::string& v) { v = s.size() >= 2 ? s.substr(1, s.size() - 2) : s; }
inline void parse(const std::string& s, Ints& v) { v = parse_ints(s); }
inline void parse(const std::string& s, Classes& v) {
  v.clear();
  for (const auto& [layer, heads] : json_members(s.c_str()))
    v[static_cast<i32>(std::strtol(layer.c_str(), nullptr, 10))] = parse_ints(heads);
}
inline void parse(const std::string& s, Data& v) { parse(s, v.file); }
inline void parse(const std::string&, Base&) {}

}  // namespace detail

/// Declares the members of a parameter struct. Defaults are the struct's own initialisers.
template <class P>
class Schema {
 public:
  /// `range` as in Param.
  template <class T>
  Schema& field(const char* name, T P::*member, const char* doc, const char* range = "") {
    return add(name, member, doc, range, 0);
  }
  /// A number that may stand in for a budget (`calibrate` bisects it).
  template <class T>
  Schema& knob(const char* name, T P::*member, const char* doc, const char* range = "") {
    return add(name, member, doc, range, 1);
  }
  /// What must hold of the parameters `names` ("block, stride") together: `text` says it and is shown with them,
  /// `holds` tells. The core asks before anything runs; its presets and defaults must fulfil it too.
  Schema& require(const char* names, const char* text, std::function<bool(const P&)> holds) {
    constraints.push_back({names, text, std::move(holds)});
    return *this;
  }

  struct Field {
    std::string name, doc, type, default_value, range;
    i32 is_budget_knob;
    std::function<void(P&, const std::string&)> read;
  };
  struct Rule {
    std::string names, text;
    std::function<bool(const P&)> holds;
  };
  std::vector<Field> fields;
  std::vector<Rule> constraints;

  /// The parameters of one flat JSON object; those that it leaves out keep their defaults.
  P read(const char* json) const {
    P out{};
    const auto members = detail::json_members(json);
    for (const Field& field : fields)
      if (const auto it = members.find(field.name); it != members.end()) field.read(out, it->second);
    return out;
  }

 private:
  template <class T>
  Schema& add(const char* name, T P::*member, const char* doc, const char* range, i32 knob) {
    fields.push_back({name, doc, detail::type_name<T>(), detail::to_json(P{}.*member), range, knob,
                      [member](P& p, const std::string& s) { detail::parse(s, p.*member); }});
    return *this;
  }
};

/// The parameters that every select or evict strategy has; the core fills them.
struct Common {
  Gqa gqa = Gqa::none;
  i32 sinks = 0, recent = 0;
};

}  // namespace lacuna::sdk
