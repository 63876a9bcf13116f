// 128K tokens: every phase of a layer under every strategy, in bounded time and memory. LACUNA_LONG_TOKENS sets another
// length, LACUNA_LONG_STRATEGIES (a comma-separated list) fewer strategies.
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>

#include <chrono>
#include <cstdlib>

#include "replay/conformance_bench.hpp"
#include "replay/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::i64;

namespace {

constexpr double kMostSeconds = 60;  // a strategy's phases on one layer
constexpr i64 kMostBytes = i64{100} << 30;

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

i64 used_bytes() {
  std::size_t available = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&available, &total) == cudaSuccess);
  return static_cast<i64>(total - available);
}

}  // namespace

TEST_SUITE_BEGIN("slow");

TEST_CASE("a long layer replays within its time and memory") {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  SyntheticSpec spec;
  spec.num_qo_heads = 32;
  spec.num_kv_heads = 8;
  spec.head_dim = 128;
  spec.decode_tokens = 16;
  spec.prefill_tokens = std::stoll(environment("LACUNA_LONG_TOKENS", "131072")) - spec.decode_tokens;
  spec.dtype = sdk::Dtype::bf16;
  const Clock::time_point begin = Clock::now();
  const Trace trace = synthetic_trace(spec);
  MESSAGE("trace of ", spec.prefill_tokens, " + ", spec.decode_tokens, " tokens made in ", seconds_since(begin), " s");
  const std::string wanted = environment("LACUNA_LONG_STRATEGIES", "");
  for (const StrategyType* type : built_ins().all()) {
    if (!wanted.empty() && ("," + wanted + ",").find("," + type->name() + ",") == std::string::npos) continue;
    const Bench bench(built_ins(), *type);
    std::vector<Cell> cells;
    ReplayOptions options;
    options.device = cuda_device();
    for (const Use& use : bench.uses()) {
      cells.push_back(bench.cell(use, bench.entry().takes_budget ? Json{{"density", 0.1}} : Json::object()));
      options.phases.insert(use.phase);
    }
    const Clock::time_point start = Clock::now();
    const ReplayResult result = replay(trace, cells, options);
    const double seconds = seconds_since(start);
    const i64 bytes = used_bytes();
    MESSAGE(type->name(), ": ", seconds, " s, ", static_cast<double>(bytes) / (1 << 30), " GiB of the GPU afterwards");
    for (const Row& row : result.rows) {
      CAPTURE(row.error);
      CHECK(row.status == "ok");
      MESSAGE("  ", name_of(row.phase), " ", row.cost.seconds, " s, realised ", row.realised_head);
    }
    CHECK(seconds <= kMostSeconds);
    CHECK(bytes <= kMostBytes);
  }
}

TEST_SUITE_END();
