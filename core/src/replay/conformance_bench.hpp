// What the conformance rules run a strategy on: generated traces, the uses it declares, and the company that a wrapper
// or an allocator needs.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/replay/layer_replay.hpp"
#include "lacuna/strategy/registry.hpp"
#include "replay/phase_run.hpp"

namespace lacuna {

/// One way to use a strategy: a role in a phase.
struct Use {
  RoleKind role;
  ReplayPhase phase;
};

struct Shape {
  int num_qo_heads, num_kv_heads, head_dim;
  sdk::i64 prefill_tokens, decode_tokens;
  auto operator<=>(const Shape&) const = default;
};

/// Long enough that budgets from a tenth on leave room beside forced units.
inline constexpr Shape kRegular{8, 2, 64, 640, 12};
/// Every group and head size that models have, against lengths on both sides of tiles, pages and blocks.
inline constexpr Shape kAwkward[] = {{1, 1, 64, 1, 1},    {3, 1, 64, 17, 3},  {6, 2, 128, 64, 2}, {7, 1, 128, 65, 2},
                                     {8, 1, 256, 130, 2}, {8, 8, 64, 257, 2}, {14, 2, 64, 33, 1}};

/// What came of one run; `error` is empty unless the strategy failed.
struct Outcome {
  std::string error;
  PhaseRun run;
  Eviction eviction;

  bool failed() const { return !error.empty(); }
};

class Bench {
 public:
  Bench(const Registry& registry, const StrategyType& type, std::shared_ptr<Device> device = cpu_device());

  const StrategyType& type() const { return type_; }
  const sdk::Entry& entry() const { return type_.entry(); }
  const std::vector<Use>& uses() const { return uses_; }
  /// Budgets to try, as settings: several for a strategy that takes one, and none.
  std::vector<Json> budgets(const Use& use) const;
  /// The strategy in its role with these settings (parameters and budget; an allocator's budget goes to its scorer), no
  /// layer left dense. Throws Error.
  Cell cell(const Use& use, const Json& settings) const;
  /// The cell with what the strategy calibrates on the generated trace of that shape, where it needs a file.
  Cell calibrated(Cell cell, const Shape& shape);
  /// A companion for that role and phase that ranks, or null.
  const StrategyType* scorer(RoleKind role, ReplayPhase phase) const;
  /// The layer of a generated trace of that shape.
  LayerReplay& layer(const Shape& shape, bool poison);
  const TraceInfo& info(const Shape& shape) { return trace(shape).info(); }
  Outcome run(const Use& use, const Shape& shape, const Cell& cell, bool poison = true);
  /// What it plans for the regular shape.
  sdk::Plan plan(const Use& use, const Cell& cell);
  /// Evictions to stand beside a selection: once at the cut, and, where there is one, by the attention received, which
  /// goes on while decoding.
  std::vector<Resolved> evictors() const;
  PhaseQueries queries(const Use& use, const Shape& shape, const Cell& cell);

 private:
  const Trace& trace(const Shape& shape);
  Trace generated(const Shape& shape) const;
  Json companion(RoleKind role, ReplayPhase phase, const Json& budget) const;

  const Registry& registry_;
  const StrategyType& type_;
  std::shared_ptr<Device> device_;
  std::vector<Use> uses_;
  std::map<Shape, Trace> traces_;
  std::map<Shape, std::shared_ptr<const CalibrationFile>> calibrations_;
  std::map<std::pair<Shape, bool>, std::unique_ptr<LayerReplay>> layers_;
};

/// "decode (8 heads, 2 KV heads, d 64, 640 + 12 tokens) with {...}".
std::string describe(const Use& use, const Shape& shape, const Json& settings);
/// "" or what differs first, bit for bit.
std::string difference(const Outcome& a, const Outcome& b);

}  // namespace lacuna
