// lacuna calibrate: what a strategy learns from traces, or the value of its budget knob at a density.
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "command.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/replay/calibrate.hpp"
#include "lacuna/study/scenario.hpp"

namespace lacuna::cli {
namespace {

struct Options {
  std::string strategy, out;
  std::vector<std::string> traces, set;
  std::optional<double> density;
};

std::string role_of(const StrategyType& type) {
  return type.can_select() ? "select" : type.can_evict() ? "evict" : "allocate";
}

void print_knob(const Cell& cell, const std::vector<Trace>& traces) {
  const BudgetKnob& knob = *cell.select->knob;
  const KnobValue found = calibrate_knob(cell, traces);
  fmt::print("{} = {:.6g}  # realised density {:.4f}, asked for {:.4f}\n", knob.name, found.value, found.realised,
             knob.density);
}

void run_calibrate(const Session& session, const Options& o) {
  const Registry registry = session.registry();
  const StrategyType& type = registry.find(o.strategy);
  const std::string role = role_of(type);
  Json roles{{role, {{"name", o.strategy}}}};
  if (o.density) roles[role].update(Json{{"density", *o.density}, {"calibrate", true}});
  apply_settings(registry, roles, o.set);
  const Cell cell = make_cell(registry, roles, 0, "command line", "");
  std::vector<Trace> traces;
  for (const std::string& path : o.traces) traces.push_back(Trace::open(path));
  if (o.density) return print_knob(cell, traces);
  if (o.out.empty())
    throw Error({"nowhere to write the calibration", "--out FILE, .safetensors or .toml", "none", "command line",
                 "Or give --density to bisect a budget knob."});
  const Resolved& resolved = cell.select ? *cell.select : cell.evict ? *cell.evict : *cell.allocate;
  const CalibrationFile file = calibrate(resolved, traces);
  write_calibration(file, o.out);
  fmt::print("{}: {} layers, for parameter '{}' of '{}'\n", o.out, file.layers.size(), data_parameter(type),
             o.strategy);
}

}  // namespace

void add_calibrate(CLI::App& app, Session& session) {
  CLI::App* command =
      app.add_subcommand("calibrate", "learns a strategy's tables from traces, or its budget knob at a density");
  auto o = std::make_shared<Options>();
  command->add_option("strategy", o->strategy, "a strategy")->required();
  command->add_option("--trace", o->traces, "traces of one model")->required();
  command->add_option("--out", o->out, "the file to write: .safetensors or .toml");
  command->add_option("--density", o->density, "instead: print the budget knob's value that realises it")
      ->check(CLI::Range(0.0, 1.0));
  command->add_option("--set", o->set, "key=value of the strategy")->allow_extra_args(false);
  command->callback([&session, o] { run_calibrate(session, *o); });
}

}  // namespace lacuna::cli
