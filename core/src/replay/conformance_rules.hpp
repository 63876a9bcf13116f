// The rules, one function each: what a strategy must satisfy in every use that it declares.
#pragma once

#include <string>

#include "replay/conformance_bench.hpp"

namespace lacuna {

struct Verdict {
  bool passed;
  std::string detail;
};

inline Verdict fail(std::string detail) { return {false, std::move(detail)}; }
inline Verdict not_applicable(const std::string& why) { return {true, "does not apply: " + why}; }

/// Every budget on the regular shape: no breach of contract, no failure, finite outputs.
Verdict rule_contract(Bench& bench);
/// The same on every awkward shape.
Verdict rule_awkward_shape(Bench& bench);
/// Nothing depends on what lies beyond the cache and the queries: NaN there changes no bit.
Verdict rule_poison(Bench& bench);
/// Equal seed, equal bits, on one thread and on two; another seed matters exactly where `stochastic` is declared.
Verdict rule_determinism(Bench& bench);
/// The realised set keeps to its target; at a density that leaves room for everything forced there is no excuse.
Verdict rule_budget(Bench& bench);
/// What plan() forces is readable in every row.
Verdict rule_forced_units(Bench& bench);
/// The declared dense point equals the fp64 oracle through the sparse path.
Verdict rule_dense_point(Bench& bench);
/// Where declared: a larger budget reads a superset and no less mass.
Verdict rule_nested(Bench& bench);
/// Sides brought up to date step by step, across appends and evictions, choose as sides built from scratch do.
Verdict rule_side_data(Bench& bench);
/// Allocators hand out what they were given: over the model's layers within 1 %, over a layer's rows within a token a
/// row.
Verdict rule_allocation(Bench& bench);

}  // namespace lacuna
