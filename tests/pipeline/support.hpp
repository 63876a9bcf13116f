// Strategies whose scores a test writes down, and one layer of a generated trace to use them on.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>

#include "lacuna/replay/layer_replay.hpp"
#include "lacuna/sdk.hpp"

namespace lacuna::testing {

using sdk::i32;
using sdk::i64;

/// What the scripted strategies plan and score; set by the test before it uses them.
struct Script {
  i32 unit = 16, q_tile = 64, first_units = 0, last_units = 0, min_units = 0, per_query_head = 1;
  sdk::ScoreKind kind = sdk::ScoreKind::rank;
};
inline Script script;

/// Score of a unit: any fixed function without order in it. In [0, 1) with many ties.
inline float scripted_score(i64 head, i64 tile, i64 unit) {
  const sdk::Random random{7, 0};
  return std::floor(random.uniform(static_cast<sdk::u64>(head * 1000 + tile), static_cast<sdk::u64>(unit)) * 64.f) /
         64.f;
}
/// The same as a mass: rows of `units` sum to 1.
inline float scripted_mass(i64 head, i64 tile, i64 unit, i64 units) {
  double sum = 0;
  for (i64 u = 0; u < units; ++u) sum += scripted_score(head, tile, u);
  return static_cast<float>(scripted_score(head, tile, unit) / sum);
}

struct Scripted : sdk::Strategy {
  static sdk::Info info() {
    sdk::Info i{};
    i.name = "scripted", i.summary = i.rule = i.paper = "-";
    i.phases = sdk::kPrefill | sdk::kDecode | sdk::kEvict;
    i.comparable_across_heads = 1;
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override {
    p.unit_tokens = script.unit;
    p.q_tile = script.q_tile;
    p.first_units = script.first_units;
    p.last_units = script.last_units;
    p.min_units = script.min_units;
    p.per_query_head = script.per_query_head;
    p.score_kind = script.kind;
  }
  void score(sdk::Context&, sdk::Scores& s) override {
    for (i64 r = 0; r < s.rows.count(); ++r) {
      const i64 last = s.rows.first_position + s.rows.query_end(r),
                visible = (last + s.unit_tokens - 1) / s.unit_tokens;
      for (i64 u = 0; u < std::min<i64>(s.units, visible); ++u)
        s.value[r * s.stride + u] = script.kind == sdk::ScoreKind::mass
                                        ? scripted_mass(s.rows.head_of(r), s.rows.tile_of(r), u, visible)
                                        : scripted_score(s.rows.head_of(r), s.rows.tile_of(r), u);
    }
  }
};

template <class T>
const StrategyType& type_of() {
  static const StrategyType type(*sdk::detail::EntryFor<T>::get(), "test", "0");
  return type;
}

inline Resolved resolved(const StrategyType& type, BudgetSpec budget, const Json& shared = Json::object()) {
  Resolved r;
  r.type = &type;
  r.own = Json::object();
  r.shared = shared;
  r.budget = budget;
  return r;
}

inline BudgetSpec density(double value, bool proportional = false) {
  return {BudgetSpec::Kind::density, value, proportional};
}

inline Trace generated(int qo_heads, int kv_heads, int head_dim, i64 prefill, i64 decode) {
  SyntheticSpec spec;
  spec.num_qo_heads = qo_heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = head_dim;
  spec.prefill_tokens = prefill;
  spec.decode_tokens = decode;
  spec.captured_layers = {2};
  return synthetic_trace(spec);
}

/// One layer, and pipelines on it.
struct Bed {
  Trace trace;
  LayerReplay layer;
  LayerSetup setup;
  i64 prompt;

  explicit Bed(Trace t, int index = 2)
      : trace(std::move(t)),
        layer(trace, index, 16, true),
        setup(layer.setup(0, true)),
        prompt(trace.info().prefill_tokens) {}

  LayerPipeline pipeline(const Roles& roles, i64 tokens, ChooseOptions options = {true}) {
    return LayerPipeline(roles, setup, layer.fork(tokens), options);
  }
  Choice prefill(const Resolved& select, ChooseOptions options = {true}, const Resolved* allocate = nullptr) {
    return pipeline({&select, nullptr, allocate}, prompt, options).prefill().choice;
  }
};

}  // namespace lacuna::testing
