// lacuna dump: what a method chose on one layer, as safetensors.
#include <fmt/format.h>

#include <memory>
#include <optional>

#include "command.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/replay/dump.hpp"
#include "lacuna/study/scenario.hpp"

namespace lacuna::cli {
namespace {

struct Options {
  std::string trace, phase, select, evict, allocate, cut, out, device = "cpu";
  int layer = 0, page_size = 16;
  std::optional<double> density, mass;
  std::optional<std::int64_t> tokens, units;
  std::vector<std::string> set;
  std::uint64_t seed = 0;
  bool cells = false, scores = false, check = false, allow_leak = false;
};

ReplayPhase phase_of(const std::string& name) {
  for (const ReplayPhase p : {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode})
    if (name == name_of(p)) return p;
  throw Error({"unknown phase '" + name + "'", "", "", "--phase", suggestion(name, {"prefill", "evict", "decode"})});
}

/// The budget goes to the role that is compared in the phase; --set role.density=... serves the other.
void add_budget(const Options& o, ReplayPhase phase, Json& roles) {
  const std::string role = phase == ReplayPhase::evict || !roles.contains("select") ? "evict" : "select";
  Json budget = Json::object();
  if (o.density) budget["density"] = *o.density;
  if (o.tokens) budget["tokens"] = *o.tokens;
  if (o.units) budget["units"] = *o.units;
  if (o.mass) budget["mass"] = *o.mass;
  if (budget.empty()) return;
  if (!roles.contains(role))
    throw Error({"a budget without a role that takes it", "--" + role, "none", "command line", "Name the strategy."});
  roles[role].update(budget);
}

void run_dump(const Session& session, const Options& o) {
  const Registry registry = session.registry();
  const ReplayPhase phase = phase_of(o.phase);
  Json roles = Json::object();
  if (!o.select.empty()) roles["select"]["name"] = o.select;
  if (!o.evict.empty()) roles["evict"]["name"] = o.evict;
  if (!o.allocate.empty()) roles["allocate"]["name"] = o.allocate;
  if (roles.empty()) throw Error({"nothing to dump", "--select, --evict or --allocate", "none", "command line", ""});
  for (const auto& [role, table] : roles.items()) registry.find(table["name"].get<std::string>());
  add_budget(o, phase, roles);
  if (!o.cut.empty()) {
    if (!roles.contains("evict")) throw Error({"--cut without an eviction", "--evict", "none", "command line", ""});
    const bool digits = o.cut.find_first_not_of("0123456789") == std::string::npos && o.cut.size() < 10;
    roles["evict"]["cut"] = digits ? Json(std::stoll(o.cut)) : Json(o.cut);
  }
  apply_settings(registry, roles, o.set);
  const Cell cell = make_cell(registry, roles, o.seed, "command line", "");
  const Trace trace = Trace::open(o.trace);
  DumpOptions options;
  options.phase = phase;
  options.layer = o.layer;
  options.cells = o.cells;
  options.scores = o.scores;
  options.check = o.check;
  options.allow_leak = o.allow_leak;
  options.page_size = o.page_size;
  options.device = device_by_name(o.device);
  dump(trace, cell, options, o.out);
}

}  // namespace

void add_dump(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("dump", "what a method chose on one layer, for comparison with others");
  auto o = std::make_shared<Options>();
  command->add_option("--trace", o->trace, "a trace")->required();
  command->add_option("--layer", o->layer, "a captured layer, the model's number")->required();
  command->add_option("--phase", o->phase, "prefill, decode or evict")->required();
  command->add_option("--select", o->select, "strategy that selects");
  command->add_option("--evict", o->evict, "strategy that evicts");
  command->add_option("--allocate", o->allocate, "strategy that allocates");
  CLI::Option_group* budget = command->add_option_group("budget", "none: the method's own count or threshold");
  budget->add_option("--density", o->density, "share of the pairs (evict: of the tokens before the cut)");
  budget->add_option("--tokens", o->tokens, "tokens of a row");
  budget->add_option("--units", o->units, "units of a row");
  budget->add_option("--mass", o->mass, "top-p of scores that are masses");
  budget->require_option(0, 1);
  command->add_option("--set", o->set, "role.key=value, role.base.key=value, or key=value where one role has it")
      ->allow_extra_args(false);
  command->add_option("--cut", o->cut, "evict: end, before_question or a number of tokens");
  command->add_option("--seed", o->seed, "of stochastic methods");
  command->add_option("--page-size", o->page_size, "tokens of a KV page")->check(CLI::Range(1, 4096));
  command->add_option("--device", o->device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--out", o->out, "the safetensors file to write")->required();
  command->add_flag("--cells", o->cells, "also the canonical token set of every row");
  command->add_flag("--scores", o->scores, "also the scores, as ranked");
  command->add_flag("--check", o->check, "check contracts and poison what must not be read");
  command->add_flag("--allow-leak", o->allow_leak, "also on a trace that the strategy was calibrated on");
  command->callback([&session, o] { run_dump(session, *o); });
}

}  // namespace lacuna::cli
