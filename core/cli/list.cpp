// lacuna list: the strategies that are there.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "command.hpp"
#include "lacuna/strategy/instance.hpp"

namespace lacuna::cli {

std::string kind_of(const StrategyType& type) {
  std::vector<std::string> uses;
  for (const RoleKind role : {RoleKind::select, RoleKind::evict, RoleKind::allocate})
    if (type.can(role)) uses.emplace_back(verb(role));
  std::string wrapper;
  if (type.entry().wrapper) {
    const std::string base = type.default_base();
    wrapper =
        base.empty() ? " wrapper" : fmt::format(" wrapper (base {})", Json::parse(base)["name"].get<std::string>());
  }
  return fmt::format("{}{}", fmt::join(uses, ", "), wrapper);
}

std::vector<std::string> phases_of(const StrategyType& type) {
  std::vector<std::string> out;
  if (type.in_phase(sdk::kPrefill)) out.emplace_back("prefill");
  if (type.in_phase(sdk::kEvict)) out.emplace_back("evict");
  if (type.in_phase(sdk::kDecode)) out.emplace_back("decode");
  return out;
}

namespace {

void print_table(const std::vector<const StrategyType*>& types) {
  std::vector<std::vector<std::string>> rows = {{"name", "kind", "phases", "roles", "summary"}};
  for (const StrategyType* t : types)
    rows.push_back({t->name(), kind_of(*t), fmt::format("{}", fmt::join(phases_of(*t), ", ")),
                    fmt::format("{}", fmt::join(t->roles(), ", ")), t->entry().summary});
  std::vector<std::size_t> width(rows.front().size(), 0);
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c + 1 < row.size(); ++c) line += fmt::format("{:<{}}  ", row[c], width[c]);
    fmt::print("{}{}\n", line, row.back());
  }
}

void print_json(const std::vector<const StrategyType*>& types) {
  Json out = Json::array();
  for (const StrategyType* t : types) {
    const sdk::Entry& e = t->entry();
    out.push_back({{"name", t->name()},
                   {"kind", kind_of(*t)},
                   {"phases", phases_of(*t)},
                   {"roles", t->roles()},
                   {"summary", e.summary},
                   {"takes_budget", e.takes_budget != 0},
                   {"stochastic", e.stochastic != 0},
                   {"clairvoyant", e.clairvoyant != 0},
                   {"default_base", t->default_base().empty() ? Json() : Json::parse(t->default_base())},
                   {"library", t->library()},
                   {"id", t->id()}});
  }
  fmt::print("{}\n", out.dump(1));
}

}  // namespace

void add_list(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("list", "strategies: name, kind, phases, roles");
  auto as_json = std::make_shared<bool>(false);
  command->add_flag("--json", *as_json, "as JSON");
  command->callback([&session, as_json] {
    const Registry registry = session.registry();
    *as_json ? print_json(registry.all()) : print_table(registry.all());
  });
}

}  // namespace lacuna::cli
