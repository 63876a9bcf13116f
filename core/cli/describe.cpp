// lacuna describe NAME: all that a strategy says about itself.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

#include "command.hpp"

namespace lacuna::cli {
namespace {

void print_params(const StrategyType& type, bool shared) {
  for (const ParamSpec& p : type.params()) {
    if (p.shared != shared) continue;
    const std::string range = p.range.empty() ? "" : ", " + range_text(p);
    fmt::print("  {} = {}  ({}{}{})\n      {}\n", p.name, p.default_json, p.type, range,
               p.budget_knob ? ", budget knob" : "", p.doc);
  }
}

void describe(const StrategyType& type) {
  const sdk::Entry& e = type.entry();
  fmt::print("{}: {}\n\npaper    {}\nkind     {}\nphases   {}\nroles    {}\n", type.name(), e.summary, e.paper,
             kind_of(type), fmt::join(phases_of(type), ", "), fmt::join(type.roles(), ", "));
  std::vector<std::string> facts;
  const std::pair<int, const char*> flags[] = {
      {e.clairvoyant, "clairvoyant"}, {e.stochastic, "stochastic"},
      {e.query_aware, "query-aware"}, {e.comparable_across_heads, "comparable across heads"},
      {e.nested, "nested"},           {!e.takes_budget, "takes no budget"}};
  for (const auto& [holds, text] : flags)
    if (holds) facts.emplace_back(text);
  if (!facts.empty()) fmt::print("facts    {}\n", fmt::join(facts, ", "));
  fmt::print("dense at {}\n", *e.dense_point ? e.dense_point : "no point");
  fmt::print("library  {} (id {})\n\nrule\n  {}\n\nparameters\n", type.library(), type.id(), e.rule);
  print_params(type, false);
  if (e.num_constraints > 0) fmt::print("\nconstraints\n");
  for (int i = 0; i < e.num_constraints; ++i) fmt::print("  {}\n", e.constraints[i].text);
  fmt::print("\nshared parameters\n");
  print_params(type, true);
  if (!type.presets().empty()) fmt::print("\npresets\n  {}\n", e.presets);
}

}  // namespace

void add_describe(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("describe", "one strategy: rule, paper, parameters, presets");
  auto name = std::make_shared<std::string>();
  command->add_option("name", *name, "a strategy")->required();
  command->callback([&session, name] {
    const Registry registry = session.registry();
    describe(registry.find(*name));
  });
}

}  // namespace lacuna::cli
