// Scenario files that vanish with the test, and the strategies that come with the build.
#pragma once

#include <string>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/study/scenario.hpp"
#include "scratch_directory.hpp"

namespace lacuna::testing {

inline const Registry& built_ins() {
  static const Registry& registry = []() -> Registry& {
    static Registry r;
    r.load_standard({});
    return r;
  }();
  return registry;
}

class ScenarioFile {
 public:
  explicit ScenarioFile(const std::string& text) { write_bytes(path(), text); }
  std::string path() const { return scratch_.file("s.toml"); }
  std::string directory() const { return scratch_.path(); }

 private:
  ScratchDirectory scratch_;
};

/// A scenario from its text, after `[trace] files = ["t.safetensors"]` and a line break.
inline Scenario parse(const std::string& text, const Overrides& overrides = {}) {
  const ScenarioFile file("trace.files = [\"t.safetensors\"]\n" + text);
  return load_scenario(file.path(), built_ins(), overrides);
}

/// The text of the Error that parsing throws; "" if it throws none.
inline std::string parse_error(const std::string& text, const Overrides& overrides = {}) {
  try {
    parse(text, overrides);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

inline std::vector<std::string> labels_of(const Scenario& s) {
  std::vector<std::string> out;
  for (const Cell& c : s.cells) out.push_back(c.label);
  return out;
}

}  // namespace lacuna::testing
