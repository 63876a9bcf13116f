// A strategy with resolved parameters, and safe calls of its roles.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "lacuna/strategy/budget_spec.hpp"
#include "lacuna/strategy/calibration_file.hpp"
#include "lacuna/strategy/registry.hpp"

namespace lacuna {

using Json = nlohmann::ordered_json;

/// density, tokens, units, mass or shape: the keys of a role's table that make its budget.
bool is_budget_key(const std::string& name);

/// A number of a strategy's own that is to be set so that a density comes out (`calibrate = true`).
struct BudgetKnob {
  std::string name;
  double lo = 0, hi = 1;  // where it may lie
  bool whole = false;
  double density = 0;         // asked for
  std::string calibrated_on;  // content ids of the traces that it was set on, comma-separated; "": not yet
};

/// A strategy by name with every parameter resolved and valid.
struct Resolved {
  const StrategyType* type = nullptr;
  Json own;                        // the strategy's own parameters, schema order; class tables as {"3": [0, 2]}
  Json shared;                     // gqa, dense_layers, sinks, recent, (evict) cut, positions: those that apply
  BudgetSpec budget;               // as given in the role's table
  std::shared_ptr<Resolved> base;  // wrappers
  std::optional<BudgetKnob> knob;  // `calibrate = true`: then there is no budget
  std::map<std::string, std::shared_ptr<const CalibrationFile>> data;  // by parameter of type data, where one is given

  /// gqa, sinks and recent as shared; one that the strategy names itself, or that does not apply, is none or 0.
  sdk::Common common() const;
  std::vector<int> dense_layers() const;
  bool keeps_dense(int layer) const;
  /// {"name": ..., own..., shared..., budget..., "data_ids": {...}, "base": {...}}: canonical, for rows, hashes and
  /// `dump`. Equal settings give equal text, and resolving it again gives it back.
  Json describe() const;
};

/// Checks names, types, ranges, choices and constraints; fills in preset and defaults (a given value wins over the
/// preset, the preset over the default); reads class tables: a TOML file relative to `directory`, or a table,
/// `layer.3.full = [0, 2]` or 3 = [0, 2]. `given` is an object with "name"; a string stands for {"name": string}. A
/// wrapper's "base" is resolved for the same role; dense_layers, cut and positions belong to the wrapper alone, and a
/// base's preset does not set them. `where` goes with errors ("scenario.toml:12:3"). Throws Error with the nearest
/// valid names.
Resolved resolve(const Registry& registry, const Json& given, const std::string& where, const std::string& directory,
                 RoleKind role);

/// Calls a strategy's roles; an error it returns becomes Error "strategy 'x', role score: ...", as does calling a role
/// that it does not have.
class Instance {
 public:
  explicit Instance(const Resolved& resolved);
  ~Instance();
  Instance(Instance&&) noexcept;
  const sdk::Entry& entry() const { return *entry_; }
  const Resolved& resolved() const { return resolved_; }

  bool has_index() const { return entry_->index; }
  bool has_score() const { return entry_->score; }
  bool has_mark() const { return entry_->mark; }
  bool has_refine() const { return entry_->refine; }
  bool has_retain() const { return entry_->retain; }
  bool has_attended() const { return entry_->attended; }
  bool has_rewrite() const { return entry_->rewrite; }
  bool has_allocate_layers() const { return entry_->allocate_layers; }
  bool has_allocate_rows() const { return entry_->allocate_rows; }

  void plan(sdk::Services&, sdk::Plan&);
  void index(sdk::Services&, const sdk::Dirty&);
  void score(sdk::Services&, sdk::Scores&);
  void mark(sdk::Services&, const sdk::Budget&, sdk::Selection&);
  void refine(sdk::Services&, const sdk::Budget&, sdk::Selection&);
  void allocate_layers(sdk::Services&, sdk::LayerBudget&);
  void allocate_rows(sdk::Services&, const sdk::Scores*, sdk::Budget&);
  void retain(sdk::Services&, const sdk::Budget&, sdk::Kept&);
  void attended(sdk::Services&, const sdk::Attended&);
  void rewrite(sdk::Services&, const sdk::Rewrite&);
  void calibrate(sdk::Services&, sdk::Calibration&);

 private:
  Resolved resolved_;
  const sdk::Entry* entry_;
  sdk::Strategy* self_ = nullptr;
};

}  // namespace lacuna
