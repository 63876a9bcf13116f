// Strategies found in shared libraries. Built-ins and a stranger's plug-in take the same path.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/sdk/strategy.hpp"

namespace lacuna {

/// One parameter of a strategy: its own (from the plug-in's schema) or one that every strategy of its kind shares.
struct ParamSpec {
  std::string name, doc, type, default_json, range;
  bool budget_knob = false, shared = false;
};

/// A strategy of a loaded library. Lives as long as the process: libraries are never unloaded.
class StrategyType {
 public:
  StrategyType(const sdk::Entry& entry, std::string library, std::string id);
  const sdk::Entry& entry() const { return *entry_; }
  std::string name() const { return entry_->name; }
  const std::string& library() const { return library_; }
  /// Hash of the library's loadable sections, 16 hex digits.
  const std::string& id() const { return id_; }
  /// The strategy's own parameters first, then the shared ones (gqa, dense_layers, sinks, recent; eviction: cut, positions)
  /// that its own do not name, with the defaults the strategy gives them.
  const std::vector<ParamSpec>& params() const { return params_; }
  std::vector<std::string> presets() const;

  bool can_select() const;    // score, mark or refine, in prefill or decode
  bool can_evict() const;     // phase evict, score or retain
  bool can_allocate() const;  // allocate_layers or allocate_rows
  bool in_phase(sdk::Phases phase) const { return (entry_->phases & phase) != 0; }
  std::vector<std::string> roles() const;  // names of the functions it overrides

 private:
  const sdk::Entry* entry_;
  std::string library_, id_;
  std::vector<ParamSpec> params_;
};

class Registry {
 public:
  /// Loads one library (RTLD_NOW | RTLD_LOCAL) and adds its strategies. Throws Error (naming file, expected, found) when it is
  /// missing, not a library, without the symbol `lacuna_plugin`, of another ABI or C++ runtime, malformed, or names a strategy
  /// that is already there; then nothing of it is added.
  void load(const std::string& library);
  /// Loads every *.so of a directory, in name order. One that fails is reported and skipped.
  void load_directory(const std::string& directory);
  /// The standard places, in order: the directories given, LACUNA_PLUGIN_PATH (colon-separated), and `lacuna/plugins` or
  /// `plugins` beside the library or program that holds this code. A repeated library is loaded once.
  void load_standard(const std::vector<std::string>& directories);

  /// Throws Error with the nearest names.
  const StrategyType& find(const std::string& name) const;
  std::vector<const StrategyType*> all() const;  // by name
  /// Libraries that were found and could not be loaded, with the reason.
  const std::vector<std::string>& failures() const { return failures_; }

 private:
  std::vector<std::unique_ptr<StrategyType>> types_;
  std::vector<std::string> failures_, loaded_;
};

}  // namespace lacuna
