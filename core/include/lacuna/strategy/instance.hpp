// A strategy with resolved parameters, and safe calls of its roles.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "lacuna/strategy/registry.hpp"

namespace lacuna {

using Json = nlohmann::ordered_json;

/// A budget as a scenario gives it. `density`: share of the tokens (or pairs); `tokens`, `units`: counts; `mass`: top-p.
struct BudgetSpec {
  enum class Kind { none, density, tokens, units, mass } kind = Kind::none;
  double value = 0;
  bool proportional = false;  // prefill: shape = "proportional"
};

/// A strategy by name with every parameter resolved and valid.
struct Resolved {
  const StrategyType* type = nullptr;
  Json own;                      // the strategy's own parameters, schema order
  Json shared;                   // gqa, dense_layers, sinks, recent, (evict) cut, positions: those that apply
  BudgetSpec budget;             // as given in the role's table
  std::shared_ptr<Resolved> base;  // wrappers

  sdk::Common common() const;
  std::vector<int> dense_layers() const;
  /// {"name": ..., own..., shared..., budget..., "base": {...}}: canonical, for rows, hashes and `dump`.
  Json describe() const;
};

/// Checks names, types, ranges and choices; fills in preset and defaults; reads class tables (`classes`: a TOML file relative
/// to `directory`, or an inline table). `given` is an object with "name"; a string stands for {"name": string}.
/// `where` prefixes errors ("scenario.toml:12:3"). Throws Error with the nearest valid names.
Resolved resolve(const Registry& registry, const Json& given, const std::string& where, const std::string& directory);

/// Calls a strategy's roles; an error it returns becomes Error "strategy 'x', role score: ...".
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

 private:
  Resolved resolved_;
  const sdk::Entry* entry_;
  sdk::Strategy* self_ = nullptr;
};

}  // namespace lacuna
