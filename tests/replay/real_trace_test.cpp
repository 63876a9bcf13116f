// Real attention: the shipped trace under every built-in strategy, and whatever lies in LACUNA_TRACE_DIR under a few.
#include <doctest/doctest.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "lacuna/replay/trace_summary.hpp"
#include "replay/conformance_bench.hpp"
#include "replay/needs.hpp"
#include "replay/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::i64;

namespace {

constexpr int kLayer = 9;

/// Every use of every strategy.
template <class F>
void each_use(F f) {
  for (const StrategyType* type : built_ins().all()) {
    const Bench bench(built_ins(), *type);
    for (const Use& use : bench.uses()) f(bench, use);
  }
}

double mean_of(const LayerStats& stats) {
  BlockStats all;
  for (const BlockStats& s : stats.cells) all.merge(s);
  return all.mean();
}

std::vector<std::string> traces() {
  std::vector<std::string> out;
  const char* directory = std::getenv("LACUNA_TRACE_DIR");
  if (!directory || !*directory) return out;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    if (entry.path().extension() == ".safetensors") out.push_back(entry.path().string());
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<Cell> few_cells() {
  return {cell_of({{"select", {{"name", "random"}, {"density", 0.1}}}}),
          cell_of({{"select", {{"name", "streaming_llm"}, {"density", 0.1}}}}),
          cell_of({{"select", {{"name", "xattention"}}}}),
          cell_of({{"select", {{"name", "quest"}, {"density", 0.1}, {"dense_layers", Json::array()}}}}),
          cell_of({{"evict", {{"name", "snapkv"}, {"density", 0.1}}}}),
          cell_of({{"evict", {{"name", "snapkv"}, {"density", 0.5}}},
                   {"allocate", {{"name", "ada"}}},
                   {"select", {{"name", "quest"}, {"density", 0.3}}}})};
}

ReplayOptions all_phases() {
  ReplayOptions o;
  o.phases = {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode};
  return o;
}

}  // namespace

TEST_CASE(
    "lse_error is ln mass_kept wherever the model's own keys are read without weights, and no more is ever kept than "
    "there is") {
  const Trace trace = Trace::open(kShipped);
  LayerReplay layer(trace, kLayer, 16, true);
  each_use([&](const Bench& bench, const Use& use) {
    const Cell cell = bench.cell(use, bench.entry().takes_budget ? Json{{"density", 0.2}} : Json::object());
    if (!missing_need(cell, trace, false).empty()) return;
    const PhaseQueries q = phase_queries(trace.info(), use.phase, "end");
    const PhaseRun run = run_phase(layer, trace.info(), cell, use.phase, q, {true, false, false, {}, {}});
    const std::vector<double> mass = mass_of(layer, q, run);
    const std::vector<float> dense = layer.dense_lse(q.begin, q.end);
    double worst = 0;
    for (std::size_t i = 0; i < mass.size(); ++i) {
      CHECK(mass[i] <= 1.0);
      if (run.unweighted_out.empty() && !run.other_keys)
        worst = std::max(worst, std::abs(run.lse[i] - dense[i] - std::log(mass[i])));
    }
    CAPTURE(describe(use, {9, 3, 64, 1996, 52}, cell.describe()));
    CHECK(worst < 2e-5);
  });
}

TEST_CASE("declared dense points equal dense attention through the sparse path") {
  const Trace trace = Trace::open(kShipped);
  LayerReplay layer(trace, kLayer, 16, true);
  const i64 d = layer.layer().head_dim;
  struct Truth {
    std::vector<double> out, lse, scale;
  };
  constexpr i64 kLast = 256;  // queries of a phase that are held against the oracle
  std::map<ReplayPhase, Truth> truths;
  for (const ReplayPhase phase : {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode}) {
    PhaseQueries q = phase_queries(trace.info(), phase, "end");
    q.begin = std::max(q.begin, q.end - kLast);
    Truth& t = truths[phase];
    t.lse.resize(static_cast<std::size_t>(layer.layer().num_qo_heads * (q.end - q.begin)));
    t.scale.resize(t.lse.size());
    t.out.resize(t.lse.size() * static_cast<std::size_t>(d));
    attend_fp64(layer.dense_attention(q.begin, q.end), t.out.data(), t.lse.data(), t.scale.data());
  }
  each_use([&](const Bench& bench, const Use& use) {
    const std::string point = bench.entry().dense_point;
    if (point.empty()) return;
    const Cell cell = bench.cell(use, Json::parse(point));
    if (!missing_need(cell, trace, false).empty()) return;
    const PhaseQueries q = phase_queries(trace.info(), use.phase, "end");
    const PhaseRun run = run_phase(layer, trace.info(), cell, use.phase, q, {true, false, false, {}, {}});
    CHECK(run.work.sparse_rows > 0);
    const Truth& t = truths[use.phase];
    double worst_lse = 0, worst_out = 0;
    const i64 queries = q.end - q.begin, last = std::min(queries, kLast);
    for (std::size_t r = 0; r < t.lse.size(); ++r) {
      const i64 row = static_cast<i64>(r) / last * queries + queries - last + static_cast<i64>(r) % last;
      double square = 0;
      for (i64 c = 0; c < d; ++c) {
        const double off = run.out[static_cast<std::size_t>(row * d + c)] -
                           t.out[r * static_cast<std::size_t>(d) + static_cast<std::size_t>(c)];
        square += off * off;
      }
      worst_lse = std::max(
          worst_lse, std::abs(run.lse[static_cast<std::size_t>(row)] - t.lse[r]) / std::max(1.0, std::abs(t.lse[r])));
      worst_out = std::max(worst_out, std::sqrt(square) / t.scale[r]);
    }
    CAPTURE(describe(use, {9, 3, 64, 1996, 52}, cell.describe()));
    CHECK(worst_lse <= 4e-6);
    CHECK(worst_out <= 2e-5);
  });
}

TEST_CASE("no method beats the matched oracle on average, and dense loses nothing") {
  std::vector<Cell> cells;
  std::vector<std::string> names;
  each_use([&](const Bench& bench, const Use& use) {
    const Json budget = bench.entry().takes_budget ? Json{{"density", 0.1}} : Json::object();
    const Cell cell = bench.cell(use, budget);
    const std::string name = cell.describe().dump();
    if (std::find(names.begin(), names.end(), name) != names.end()) return;
    names.push_back(name);
    cells.push_back(cell);
  });
  const ReplayResult r = replay(Trace::open(kShipped), cells, all_phases());
  int noise = 0;
  for (const Row& row : r.rows) {
    CAPTURE(row.layer);
    CAPTURE(row.error);
    REQUIRE(row.status == "ok");
    noise += row.cell < 0;
    if (row.cell < 0) {
      CHECK(mean_of(row.metrics.at("output_rel_l2")) < 4e-3);
      CHECK(mean_of(row.metrics.at("output_rel_l2")) > 0);
      continue;
    }
    CAPTURE(names[static_cast<std::size_t>(row.cell)]);
    CHECK(mean_of(row.metrics.at("regret")) >= -1e-5);
    if (row.realised_head == 1 && row.read_share == 1) CHECK(mean_of(row.metrics.at("mass_kept")) > 1 - 1e-5);
  }
  CHECK(noise == 4 * 3);  // layers, phases
}

TEST_CASE("a layer's summary agrees with its attention counted out") {
  SyntheticSpec spec;
  spec.prefill_tokens = 150;
  spec.captured_layers = {1};
  const Trace trace = synthetic_trace(spec);
  const LayerTensors t = trace.layer(1);
  const sdk::Layer l = trace.info().layer(1);
  const i64 tokens = trace.info().tokens(), d = l.head_dim;
  double entropy = 0, sinks = 0, recent = 0, max_logit = -1e300, queries = 0;
  for (i64 h = 0; h < l.num_qo_heads; ++h)
    for (i64 q = 0; q < 150; ++q) {
      std::vector<double> logit;
      for (i64 j = 0; j <= q; ++j) {
        double x = 0;
        for (i64 c = 0; c < d; ++c)
          x += static_cast<double>(static_cast<const float*>(t.q.data)[(h * tokens + q) * d + c]) *
               static_cast<const float*>(t.k.data)[(h / l.group() * tokens + j) * d + c];
        logit.push_back(x * l.softmax_scale);
        max_logit = std::max(max_logit, logit.back());
      }
      double sum = 0;
      for (const double x : logit) sum += std::exp(x);
      queries += q >= 64;
      for (i64 j = 0; j <= q; ++j) {
        const double p = std::exp(logit[static_cast<std::size_t>(j)]) / sum;
        entropy -= p * std::log(p);
        if (q >= 64 && j < 4) sinks += p;
        if (q >= 64 && q - j < 64) recent += p;
      }
    }
  const LayerSummary s = summarize_layer(trace, 1);
  CHECK(s.layer == 1);
  CHECK(s.entropy == doctest::Approx(entropy / static_cast<double>(150 * l.num_qo_heads)).epsilon(1e-4));
  CHECK(s.sink_mass == doctest::Approx(sinks / queries).epsilon(1e-4));
  CHECK(s.recent_mass == doctest::Approx(recent / queries).epsilon(1e-4));
  CHECK(s.max_logit == doctest::Approx(max_logit).epsilon(1e-4));
}

TEST_CASE("every further trace replays") {
  const std::vector<std::string> files = traces();
  if (files.empty()) MESSAGE("skipped: LACUNA_TRACE_DIR names no directory of traces");
  for (const std::string& file : files) {
    CAPTURE(file);
    const Trace trace = Trace::open(file);
    const ReplayResult r = replay(trace, few_cells(), all_phases());
    CHECK(r.rows.size() >= trace.info().captured_layers.size() * 10);
    for (const Row& row : r.rows) {
      CAPTURE(row.error);
      CHECK(row.status == "ok");
      if (row.cell >= 0 && !row.marked("sliding-window")) CHECK(mean_of(row.metrics.at("regret")) >= -1e-5);
    }
  }
}

TEST_CASE("child: replay of the longest trace") {
  if (!std::getenv("LACUNA_TEST_CHILD")) {
    MESSAGE("skipped: the next case runs this one in a process of its own, to measure its memory");
    return;
  }
  std::string longest;
  i64 tokens = 0;
  for (const std::string& file : traces())
    if (const i64 n = Trace::open(file).info().tokens(); n > tokens) tokens = n, longest = file;
  REQUIRE_FALSE(longest.empty());
  for (const Row& row : replay(Trace::open(longest), few_cells(), all_phases()).rows) CHECK(row.status == "ok");
}

TEST_CASE("the longest trace replays in less than 1 GiB") {
  if (traces().empty()) {
    MESSAGE("skipped: LACUNA_TRACE_DIR names no directory of traces");
    return;
  }
  constexpr long kMostKiB = 1 << 20;
  char program[] = "/proc/self/exe", only[] = "--test-case=child: replay of the longest trace";
  char* const arguments[] = {program, only, nullptr};
  setenv("LACUNA_TEST_CHILD", "1", 1);
  pid_t child = 0;
  REQUIRE(posix_spawn(&child, program, nullptr, nullptr, arguments, environ) == 0);
  int status = 0;
  rusage usage{};
  REQUIRE(wait4(child, &status, 0, &usage) == child);
  unsetenv("LACUNA_TEST_CHILD");
  CHECK(status == 0);
  CHECK(usage.ru_maxrss < kMostKiB);
  MESSAGE("peak memory: " << usage.ru_maxrss / 1024 << " MiB");
}
