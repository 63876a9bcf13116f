// Strategies found in shared libraries. Built-ins and a stranger's plug-in take the same path.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/sdk/strategy.hpp"

namespace lacuna {

/// What a scenario asks a strategy to do.
enum class RoleKind { select, evict, allocate };
const char* verb(RoleKind role);  // "select", "evict", "allocate"

/// One parameter of a strategy: its own (from the plug-in's schema) or one that every strategy of its kind shares.
/// `type` and `range` as sdk::Param; besides type `cut`: "end", "before_question" or a number of tokens.
struct ParamSpec {
  std::string name, doc, type, default_json, range;
  bool budget_knob = false, shared = false;
};

/// The range as people write it: "1..4096", ">= 1", "(0, 1]", "mean|max"; "" for none.
std::string range_text(const ParamSpec& spec);

/// A strategy of a loaded library. Lives as long as the process: libraries are never unloaded.
class StrategyType {
 public:
  /// `entry` has passed the checks of Registry::load.
  StrategyType(const sdk::Entry& entry, std::string library, std::string id);
  const sdk::Entry& entry() const { return entry_; }
  std::string name() const { return entry_.name; }
  const std::string& library() const { return library_; }
  /// library_id of the library that holds it.
  const std::string& id() const { return id_; }
  /// The strategy's own parameters first, then the shared ones (gqa, dense_layers, sinks, recent; eviction: cut,
  /// positions) that its own do not name, with the defaults the strategy gives them: whatever it may be used for.
  const std::vector<ParamSpec>& params() const { return params_; }
  /// Those that apply in one use. gqa defaults to `none` for select and to `mean` for evict, where `none` cannot be.
  std::vector<ParamSpec> params(RoleKind role) const;
  std::vector<std::string> presets() const;
  /// The base that a wrapper has where none is given, as a role table in JSON; "" if one must be given.
  std::string default_base() const;
  /// Dense at every point of its parameters: the dense point it declares asks for nothing, nor does it take a budget.
  bool always_dense() const { return always_dense_; }

  /// Its loops can run on a GPU. One that cannot is replayed on the CPU, whatever the device of the run.
  bool has_device_code() const { return entry_.device_code != 0; }

  bool can(RoleKind role) const;
  bool can_select() const;    // score, mark or refine, in prefill or decode
  bool can_evict() const;     // phase evict, score or retain
  bool can_allocate() const;  // allocate_layers or allocate_rows
  bool in_phase(sdk::Phases phase) const { return (entry_.phases & phase) != 0; }
  std::vector<std::string> roles() const;  // names of the functions it overrides

 private:
  sdk::Entry entry_;
  std::string library_, id_;
  std::vector<ParamSpec> params_;
  bool always_dense_ = false;
};

class Registry {
 public:
  /// Loads one library (RTLD_NOW | RTLD_LOCAL) and adds its strategies. Throws Error (naming file, expected, found)
  /// when it is missing, not a library, without the symbol `lacuna_plugin`, of another ABI or C++ runtime, malformed,
  /// or names a strategy that is already there; then nothing of it is added.
  void load(const std::string& library);
  /// Loads every *.so of a directory, in name order. One that fails is reported and skipped. Throws Error if there is
  /// no such directory.
  void load_directory(const std::string& directory);
  /// The standard places, in order: the directories given (each must exist), LACUNA_PLUGIN_PATH (colon-separated; one
  /// that does not exist is reported), and the first directory there is of `lacuna/plugins`, `plugins`,
  /// `../lib/lacuna/plugins` and `../plugins` beside the library or program that holds this code. A repeated library is
  /// loaded once.
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
