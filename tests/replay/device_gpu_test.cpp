// The same strategies on both backends: what the GPU chooses is what the CPU chooses, but for scores that tie.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/conformance.hpp"
#include "replay/conformance_bench.hpp"
#include "replay/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::i32;
using sdk::i64;

namespace {

constexpr int kLayer = 9;
constexpr double kTie = 1e-4;          // scores that differ by less, relative to the row's largest, are one
constexpr double kMostTies = 0.01;     // of the rows
constexpr double kMostMassOff = 1e-3;  // what a row with ties may keep more or less

std::shared_ptr<Device> gpu() {
  static const std::shared_ptr<Device> device = cuda_device();
  return device;
}

/// One run, with the scores and the eviction that its sets come from.
struct Observed {
  PhaseRun run;
  std::vector<double> mass;
  std::vector<std::vector<i32>> kept;
  std::vector<std::vector<float>> scores;  // by call
  std::vector<i64> strides;
};

Observed observe(LayerReplay& layer, const TraceInfo& info, const Cell& cell, ReplayPhase phase) {
  Observed out;
  PhaseOptions options;
  options.poison = true;
  options.keep_scores = true;
  options.on_step = [&](const Step& step) {
    out.scores.push_back(step.choice.scores);
    out.strides.push_back(step.choice.scores_stride);
  };
  options.on_eviction = [&](const Eviction& e) { out.kept = e.kept; };
  const PhaseQueries q = phase_queries(info, phase, cut_parameter(cell));
  out.run = run_phase(layer, info, cell, phase, q, options);
  out.mass = mass_of(layer, q, out.run);
  return out;
}

struct Agreement {
  i64 rows = 0, ties = 0;
  double worst_mass = 0, worst_out = 0;
};

/// Largest difference of two backends' scores over the row's largest size.
double score_gap(const Observed& a, const Observed& b) {
  double worst = 0;
  for (std::size_t call = 0; call < std::min(a.scores.size(), b.scores.size()); ++call) {
    const auto &x = a.scores[call], &y = b.scores[call];
    REQUIRE(x.size() == y.size());
    const i64 stride = a.strides[call];
    for (i64 row = 0; stride > 0 && row < static_cast<i64>(x.size()) / stride; ++row) {
      double size = 1e-30;
      for (i64 u = 0; u < stride; ++u)
        if (std::isfinite(x[row * stride + u]))
          size = std::max(size, std::abs(static_cast<double>(x[row * stride + u])));
      for (i64 u = 0; u < stride; ++u) {
        const double p = x[row * stride + u], q = y[row * stride + u];
        if (std::isfinite(p) != std::isfinite(q)) return HUGE_VAL;
        if (std::isfinite(p)) worst = std::max(worst, std::abs(p - q) / size);
      }
    }
  }
  return worst;
}

Agreement compare(const Observed& cpu, const Observed& gpu_run) {
  Agreement a;
  REQUIRE(cpu.run.sets.size() == gpu_run.run.sets.size());
  REQUIRE(cpu.run.q_tile == gpu_run.run.q_tile);
  a.rows = static_cast<i64>(cpu.run.sets.size());
  for (std::size_t r = 0; r < cpu.run.sets.size(); ++r) {
    const RowSet &x = cpu.run.sets[r], &y = gpu_run.run.sets[r];
    a.ties += x.slots != y.slots || x.exact_sinks != y.exact_sinks || x.exact_window != y.exact_window;
  }
  REQUIRE(cpu.kept.size() == gpu_run.kept.size());
  for (std::size_t h = 0; h < cpu.kept.size(); ++h) CHECK(cpu.kept[h].size() == gpu_run.kept[h].size());
  for (std::size_t i = 0; i < cpu.mass.size(); ++i)
    a.worst_mass = std::max(a.worst_mass, std::abs(cpu.mass[i] - gpu_run.mass[i]));
  double square = 0, off = 0;
  for (std::size_t i = 0; i < cpu.run.out.size(); ++i) {
    square += static_cast<double>(cpu.run.out[i]) * cpu.run.out[i];
    off += std::pow(static_cast<double>(cpu.run.out[i]) - gpu_run.run.out[i], 2);
  }
  a.worst_out = std::sqrt(off / std::max(square, 1e-30));
  return a;
}

}  // namespace

TEST_CASE("every strategy chooses on the GPU what it chooses on the CPU, on the shipped trace") {
  const Trace trace = Trace::open(kShipped);
  LayerReplay cpu(trace, kLayer, 16, true), device(trace, kLayer, 16, true, gpu());
  for (const StrategyType* type : built_ins().all()) {
    const Bench bench(built_ins(), *type);
    for (const Use& use : bench.uses())
      for (const Json& budget : bench.budgets(use)) {
        if (budget.contains("density") && budget["density"] == 0.8) continue;
        Cell cell;
        CAPTURE(type->name());
        CAPTURE(budget.dump());
        CAPTURE(name_of(use.phase));
        Observed a, b;
        std::string refused;
        try {
          cell = bench.cell(use, budget);
          a = observe(cpu, trace.info(), cell, use.phase);
        } catch (const std::exception& e) {
          refused = e.what();
        }
        if (!refused.empty()) {  // then the GPU refuses it too
          CHECK_THROWS(observe(device, trace.info(), cell, use.phase));
          continue;
        }
        REQUIRE_NOTHROW(b = observe(device, trace.info(), cell, use.phase));
        const Agreement found = compare(a, b);
        MESSAGE(type->name(), " ", name_of(use.phase), " ", budget.dump(), ": ", found.ties, " of ", found.rows,
                " rows differ; mass off by ", found.worst_mass, ", output by ", found.worst_out);
        CHECK(static_cast<double>(found.ties) <= kMostTies * static_cast<double>(found.rows));
        CHECK(score_gap(a, b) <= kTie);
        CHECK(found.worst_mass <= (found.ties > 0 ? 0.05 : kMostMassOff));
        CHECK(found.worst_out <= (found.ties > 0 ? 2e-2 : 1e-3));
      }
  }
}

TEST_CASE("the conformance suite passes on the GPU") {
  for (const StrategyType* type : built_ins().all())
    for (const Finding& f : check_strategy(built_ins(), *type, gpu())) {
      CAPTURE(f.strategy);
      CAPTURE(f.rule);
      CAPTURE(f.detail);
      CHECK(f.passed);
    }
}

namespace {
/// Compiled by the host's compiler alone, as a plug-in on a machine without CUDA.
struct Newest : sdk::Strategy {
  static sdk::Info info() {
    sdk::Info i{};
    i.name = "newest";
    i.summary = i.paper = i.rule = "-";
    i.phases = sdk::kPrefill | sdk::kDecode;
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override { p.unit_tokens = 16; }
  void score(sdk::Context& c, sdk::Scores& s) override {
    float* value = s.value;
    const i64 stride = s.stride;
    c.for_each(s.rows.count() * s.units, [=, units = s.units] LACUNA_HD(i64 i) {
      value[i / units * stride + i % units] = static_cast<float>(i % units);
    });
  }
};
}  // namespace

TEST_CASE("a strategy without code for the GPU is replayed on the CPU, and its row says so") {
  const Trace trace = Trace::open(kShipped);
  const StrategyType type(*sdk::detail::EntryFor<Newest>::get(), "test", "0");
  REQUIRE_FALSE(type.has_device_code());
  Cell cell;
  cell.label = "newest";
  cell.select = Resolved{};
  cell.select->type = &type;
  cell.select->own = cell.select->shared = Json::object();
  cell.select->budget = {BudgetSpec::Kind::density, 0.2, false};
  ReplayOptions options;
  options.phases = {ReplayPhase::decode};
  const ReplayResult on_cpu = replay(trace, {cell}, options);
  options.device = gpu();
  const ReplayResult with_gpu = replay(trace, {cell}, options);
  REQUIRE(on_cpu.rows.size() == with_gpu.rows.size());
  for (std::size_t r = 0; r < on_cpu.rows.size(); ++r) {
    if (on_cpu.rows[r].cell < 0) continue;
    CHECK(with_gpu.rows[r].error == "");
    CHECK(with_gpu.rows[r].marked("on-cpu"));
    CHECK_FALSE(on_cpu.rows[r].marked("on-cpu"));
    CHECK(with_gpu.rows[r].realised_head == on_cpu.rows[r].realised_head);
  }
}

TEST_CASE("too little memory names what is needed and what is free, before anything is made") {
  const Trace trace = Trace::open(kShipped);
  const std::size_t needed = LayerReplay::memory(trace, kLayer, 16).total(), free = gpu()->free_bytes();
  REQUIRE(free > needed);
  const Buffer<std::byte> hog(gpu(), static_cast<i64>(free - needed / 2));
  CHECK_THROWS_WITH_AS(LayerReplay(trace, kLayer, 16, false, gpu()), doctest::Contains("too little memory"), Error);
}

TEST_CASE("rows of both backends agree within 1 %, beyond the noise floor") {
  const Trace trace = Trace::open(kShipped);
  std::vector<Cell> cells;
  for (const double density : {0.05, 0.2}) {
    cells.push_back(cell_of({{"select", {{"name", "quest"}, {"density", density}, {"dense_layers", Json::array()}}}}));
    cells.push_back(cell_of({{"select", {{"name", "vertical_slash"}, {"density", density}}}}));
    cells.push_back(cell_of({{"select", {{"name", "oracle_topk"}, {"density", density}}}}));
    cells.push_back(cell_of({{"evict", {{"name", "snapkv"}, {"density", density}}}}));
    cells.push_back(cell_of({{"evict", {{"name", "h2o"}, {"density", density}}}}));
    cells.push_back(cell_of({{"evict", {{"name", "h2o"}, {"density", density}}}, {"allocate", {{"name", "ada"}}}}));
    cells.push_back(cell_of(
        {{"select", {{"name", "quest"}, {"density", density}, {"gqa", "union"}, {"dense_layers", Json::array()}}},
         {"evict", {{"name", "h2o"}, {"density", 0.5}}}}));
    cells.push_back(cell_of({{"select", {{"name", "block_topk"}, {"density", density}, {"gqa", "union"}}}}));
    cells.push_back(
        cell_of({{"evict", {{"name", "streaming_llm"}, {"density", density}, {"positions", "compacted"}}}}));
  }
  ReplayOptions options;
  options.phases = {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode};
  const ReplayResult on_cpu = replay(trace, cells, options);
  options.device = gpu();
  const ReplayResult on_gpu = replay(trace, cells, options);
  REQUIRE(on_cpu.rows.size() == on_gpu.rows.size());
  const auto mean = [](const LayerStats& stats) {
    BlockStats all;
    for (const BlockStats& s : stats.cells) all.merge(s);
    return all.mean();
  };
  for (std::size_t r = 0; r < on_cpu.rows.size(); ++r) {
    const Row &a = on_cpu.rows[r], &b = on_gpu.rows[r];
    CAPTURE(a.layer);
    CAPTURE(a.cell);
    CAPTURE(name_of(a.phase));
    REQUIRE(a.status == b.status);
    CHECK(a.marks == b.marks);
    CHECK(b.realised_head == doctest::Approx(a.realised_head).epsilon(0.001));
    for (const auto& [name, stats] : a.metrics) {
      CAPTURE(name);
      REQUIRE(b.metrics.count(name) == 1);
      const double x = mean(stats), y = mean(b.metrics.at(name));
      CAPTURE(x);
      CAPTURE(y);
      CHECK(std::abs(x - y) <= 0.01 * std::abs(x) + 1e-4);
    }
  }
}
