#include "lacuna/replay/conformance.hpp"

#include "replay/conformance_rules.hpp"

namespace lacuna {

namespace {
struct Rule {
  const char* name;
  Verdict (*check)(Bench&);
};

constexpr Rule kRules[] = {
    {"contract", rule_contract},       {"awkward shape", rule_awkward_shape},
    {"poison", rule_poison},           {"determinism", rule_determinism},
    {"budget", rule_budget},           {"forced units", rule_forced_units},
    {"dense point", rule_dense_point}, {"nested", rule_nested},
    {"side data", rule_side_data},     {"allocation", rule_allocation},
};
}  // namespace

std::vector<Finding> check_strategy(const Registry& registry, const StrategyType& type,
                                    std::shared_ptr<Device> device) {
  std::vector<Finding> out;
  Bench bench(registry, type, std::move(device));
  for (const Rule& rule : kRules) {
    Finding f{type.name(), rule.name, false, ""};
    try {
      const Verdict v = rule.check(bench);
      f.passed = v.passed;
      f.detail = v.detail;
    } catch (const std::exception& e) {
      f.detail = e.what();
    }
    out.push_back(std::move(f));
  }
  return out;
}

}  // namespace lacuna
