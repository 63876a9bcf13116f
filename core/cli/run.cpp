// lacuna run SCENARIO: replays the traces of a study and prints its tables.
#include <fmt/format.h>
#include <csignal>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "command.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/build_info.hpp"
#include "lacuna/device/device.hpp"
#include "lacuna/replay/calibrate.hpp"
#include "lacuna/replay/layer_replay.hpp"
#include "lacuna/report/render.hpp"

namespace lacuna::cli {
namespace {

struct Options {
  std::string scenario, json;
  Overrides overrides;
  bool dry_run = false, quiet = false;
};

volatile std::sig_atomic_t stop_asked = 0;

/// The first Ctrl-C ends the run after the row at work, a second one at once.
void listen_for_stop() {
  struct sigaction action {};
  action.sa_handler = [](int) { stop_asked = 1; };
  action.sa_flags = SA_RESETHAND;
  sigaction(SIGINT, &action, nullptr);
}

/// One line on stderr for each finished phase of a layer.
class Progress {
 public:
  Progress(std::string trace, std::size_t phases, bool quiet)
      : trace_(std::move(trace)), total_(phases), quiet_(quiet) {}

  void add(const Row& row) {
    const auto phase = std::tuple(row.layer, row.phase, row.cut);
    if (rows_ > 0 && phase != phase_) flush();
    phase_ = phase;
    ++rows_;
    failed_ += row.status != "ok";
  }
  void flush() {
    if (rows_ == 0) return;
    ++done_;
    const auto& [layer, phase, cut] = phase_;
    if (!quiet_)
      note(fmt::format("{} layer {} {}{}: {} rows{} ({}/{})", trace_, layer, name_of(phase),
                       phase == ReplayPhase::evict ? fmt::format(" at {}", cut) : "", rows_,
                       failed_ > 0 ? fmt::format(", {} failed", failed_) : "", done_, total_));
    rows_ = failed_ = 0;
  }

 private:
  std::string trace_;
  std::size_t total_, done_ = 0, rows_ = 0, failed_ = 0;
  bool quiet_;
  std::tuple<int, ReplayPhase, std::int64_t> phase_;
};

/// Positions of the cuts that the study makes in a trace.
std::vector<std::int64_t> cuts_in(const Trace& trace, const Scenario& scenario) {
  std::vector<std::int64_t> out;
  for (const Cell& cell : scenario.cells) {
    if (!why_skipped(cell, ReplayPhase::evict, trace.info()).empty()) continue;
    const std::int64_t at = cut_of(trace.info(), cut_parameter(cell));
    if (std::find(out.begin(), out.end(), at) == out.end()) out.push_back(at);
  }
  return out;
}

/// A cut that no trace of the study has is a mistake; one that some lack is skipped there, and said so.
void check_cuts(const std::vector<Trace>& traces, const Scenario& scenario) {
  for (const Cell& cell : scenario.cells) {
    if (!cell.evict) continue;
    const auto has_cut = [&](const Trace& trace) {
      return why_skipped(cell, ReplayPhase::evict, trace.info()).empty();
    };
    if (std::none_of(traces.begin(), traces.end(), has_cut)) cut_of(traces.front().info(), cut_parameter(cell));
  }
}

std::size_t rows_of(const Trace& trace, const Cell& cell, const Scenario& scenario) {
  std::size_t phases = 0;
  for (const ReplayPhase p : scenario.options.phases) phases += why_skipped(cell, p, trace.info()).empty();
  return phases * trace.info().captured_layers.size();
}

void print_plan(const Scenario& scenario, const std::vector<Trace>& traces) {
  std::size_t rows = 0;
  for (std::size_t i = 0; i < scenario.cells.size(); ++i) {
    const Cell& cell = scenario.cells[i];
    std::size_t of_cell = 0;
    for (const Trace& trace : traces) of_cell += rows_of(trace, cell, scenario);
    fmt::print("{:>5}  {}  {}  ({} rows)\n", i, cell.label, cell.describe().dump(), of_cell);
    rows += of_cell;
  }
  fmt::print("{} cells, {} traces, {} rows\n", scenario.cells.size(), traces.size(), rows);
}

std::vector<Trace> open_traces(const Scenario& scenario) {
  std::vector<Trace> traces;
  for (const std::string& path : scenario.traces) {
    traces.push_back(Trace::open(path));
    for (std::size_t i = 0; i + 1 < traces.size(); ++i)
      if (traces[i].content_id() == traces.back().content_id())
        throw Error({"two traces of the same content", "different ones", scenario.traces[i] + " and " + path,
                     scenario.path, "Remove one from [trace] files."});
  }
  return traces;
}

std::size_t phases_in(const Trace& trace, const Scenario& scenario) {
  const auto& phases = scenario.options.phases;
  std::size_t out = phases.count(ReplayPhase::prefill);
  if (phases.count(ReplayPhase::evict)) out += std::max<std::size_t>(1, cuts_in(trace, scenario).size());
  if (trace.info().decode_tokens > 0) out += phases.count(ReplayPhase::decode);
  return out * trace.info().captured_layers.size();
}

/// Times on the first trace: the layer has the scenario's shape whatever the trace, which only lends its values.
CostResult time_study(const StudyResult& study, const Trace& trace, const std::shared_ptr<Device>& device, bool quiet) {
  CostRun timing;
  timing.page_size = study.scenario.options.page_size;
  timing.device = device;
  timing.stop = [] { return stop_asked != 0; };
  timing.on_row = [&](const CostRow& row) {
    if (quiet) return;
    const std::string label =
        row.cell < 0 ? "dense attention" : study.scenario.cells[static_cast<std::size_t>(row.cell)].label;
    note(fmt::format("cost: {} {} at {} tokens{}", name_of(row.phase), label, row.tokens,
                     row.total ? "" : ": not timed"));
  };
  return time_cells(trace, study.scenario.cells, study.scenario.cost, timing);
}

void calibrate(Scenario& scenario) {
  std::vector<Trace> traces;
  for (const std::string& path : scenario.calibration_traces) traces.push_back(Trace::open(path));
  if (!traces.empty()) calibrate_cells(scenario.cells, traces);
}

int run(const Session& session, const Options& options) {
  const Registry registry = session.registry();
  StudyResult study;
  study.scenario = load_scenario(options.scenario, registry, options.overrides);
  if (!options.json.empty()) {
    const std::filesystem::path directory = std::filesystem::absolute(options.json).parent_path();
    if (!std::filesystem::is_directory(directory))
      throw Error({"cannot write the JSON file", "a directory that exists", directory.string(), "--json", ""});
  }
  const std::vector<Trace> traces = open_traces(study.scenario);
  check_cuts(traces, study.scenario);
  if (options.dry_run) {
    print_plan(study.scenario, traces);
    return 0;
  }

  calibrate(study.scenario);
  const std::shared_ptr<Device> device = device_by_name(study.scenario.device);
  study.device = device->describe();
  study.build = {build_info::kVersion, build_info::kCommit, build_info::kCompiler, build_info::kFlags,
                 build_info::kCuda};
  listen_for_stop();
  for (const Trace& trace : traces) {
    study.traces.push_back(facts_of(trace));
    if (device->on_device() && !options.quiet)
      note(fmt::format(
          "a layer of {} takes {}; {} are free", study.traces.back().file,
          LayerReplay::memory(trace, trace.info().captured_layers.front(), study.scenario.options.page_size).describe(),
          bytes_text(device->free_bytes())));
    Progress progress(study.traces.back().file, phases_in(trace, study.scenario), options.quiet);
    ReplayOptions replaying = study.scenario.options;
    replaying.device = device;
    replaying.on_row = [&](const Row& row) { progress.add(row); };
    replaying.stop = [] { return stop_asked != 0; };
    ReplayResult result = replay(trace, study.scenario.cells, replaying);
    progress.flush();
    std::move(result.rows.begin(), result.rows.end(), std::back_inserter(study.rows));
    std::move(result.skips.begin(), result.skips.end(), std::back_inserter(study.skips));
  }
  if (study.scenario.cost.wanted && stop_asked == 0)
    study.cost = time_study(study, traces.front(), device, options.quiet);
  study.interrupted = stop_asked != 0;

  const std::vector<Table> tables = tabulate(study);
  if (!options.json.empty()) write_json(to_json(study, tables), options.json);
  fmt::print("{}", to_markdown(study, tables));
  const auto failed =
      std::count_if(study.rows.begin(), study.rows.end(), [](const Row& r) { return r.status != "ok"; });
  const bool untimed = study.cost && std::any_of(study.cost->rows.begin(), study.cost->rows.end(),
                                                 [](const CostRow& r) { return !r.error.empty(); });
  if (failed > 0) note(fmt::format("{} of {} rows failed; see the end of the report", failed, study.rows.size()));
  if (study.interrupted) note("interrupted");
  if (untimed) note("some methods could not be timed; see the section on cost");
  return failed > 0 || untimed || study.interrupted ? 1 : 0;
}

}  // namespace

void add_run(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("run", "replays a scenario; tables on stdout, progress on stderr");
  auto o = std::make_shared<Options>();
  command->add_option("scenario", o->scenario, "a TOML file, see docs/scenarios.md")->required();
  command
      ->add_option("--set", o->overrides.set, "role.key=value, role.base.key=value, or key=value where one role has it")
      ->allow_extra_args(false);
  command->add_option("--density", o->overrides.density, "replaces [budget]: 0.1 or 0.1,0.2")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--seed", o->overrides.seed, "replaces [run] seed: 0 or 0,1,2")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--device", o->overrides.device, "replaces [run] device");
  command->add_option("--json", o->json, "also write everything to this file");
  command->add_flag("--check", o->overrides.check, "check contracts and poison what must not be read");
  command->add_flag("--no-cost", o->overrides.no_cost, "no times, whatever [cost] says");
  command->add_flag("--dry-run", o->dry_run, "print the cells and the number of rows, run nothing");
  command->add_flag("--quiet", o->quiet, "no progress");
  command->callback([&session, o] { session.exit_code = run(session, *o); });
}

}  // namespace lacuna::cli
