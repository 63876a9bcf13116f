// The conformance suite: what every strategy must satisfy, whoever wrote it. `lacuna check FILE` and the tests run it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "lacuna/device/device.hpp"
#include "lacuna/strategy/registry.hpp"

namespace lacuna {

struct Finding {
  std::string strategy,
      rule;  // rule: "contract", "poison", "determinism", "dense point", "nested", "awkward shape", ...
  bool passed = false;
  std::string detail;  // what was found where, or why the rule does not apply
};

/// Runs every rule on one strategy over generated traces: GQA 1, 3, 7, 8; d 64, 128, 256; one token, odd lengths; every
/// phase it declares, several budgets; on `device`. `registry` supplies bases for wrappers and scorers for allocators.
/// Never throws for the strategy's faults.
std::vector<Finding> check_strategy(const Registry& registry, const StrategyType& type,
                                    std::shared_ptr<Device> device = cpu_device());

}  // namespace lacuna
