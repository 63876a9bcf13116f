// Top-k of 32 rows of 131072 values, held against a full sort before it is timed. The peer is std::nth_element on the
// same rows with the same rule for ties, which leaves the indices unsorted. Both use every thread.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "lacuna/ops/cpu_ops.hpp"

namespace {

using namespace lacuna;
using sdk::i32;
using sdk::i64;

constexpr i32 kRows = 32, kColumns = 131072;

struct Problem {
  explicit Problem(i32 wanted)
      : values(static_cast<std::size_t>(kRows) * kColumns), n(kRows, kColumns), k(kRows, wanted), count(kRows) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    for (float& x : values) x = normal(rng);
    out.resize(static_cast<std::size_t>(kRows) * static_cast<std::size_t>(wanted));
  }

  bool run(CpuOps& ops) {
    sdk::Error error{};
    return ops.topk(values.data(), kRows, kColumns, n.data(), k.data(), out.data(), count.data(), k[0], &error) == 0;
  }

  auto before(i32 row) const {
    const float* x = values.data() + static_cast<i64>(row) * kColumns;
    return [x](i32 a, i32 b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  }

  bool correct() const {
    for (i32 row = 0; row < kRows; ++row) {
      std::vector<i32> order(kColumns);
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(), before(row));
      std::sort(order.begin(), order.begin() + k[0]);
      if (count[static_cast<std::size_t>(row)] != k[0] ||
          !std::equal(order.begin(), order.begin() + k[0], out.begin() + static_cast<i64>(row) * k[0]))
        return false;
    }
    return true;
  }

  std::vector<float> values;
  std::vector<i32> n, k, count, out;
};

void report(benchmark::State& state) {
  state.counters["bytes/s"] = benchmark::Counter(4. * kRows * kColumns, benchmark::Counter::kIsIterationInvariantRate,
                                                 benchmark::Counter::kIs1000);
  state.counters["threads"] = omp_get_max_threads();
}

void topk(benchmark::State& state) {
  Problem problem(static_cast<i32>(state.range(0)));
  const sdk::Call call{};
  Cost cost;
  CpuOps ops(call, cost);
  if (!problem.run(ops) || !problem.correct()) {
    state.SkipWithError("the result differs from a full sort");
    return;
  }
  for (auto _ : state) {
    problem.run(ops);
    benchmark::DoNotOptimize(problem.out.data());
  }
  report(state);
}

void peer_nth_element(benchmark::State& state) {
  const Problem problem(static_cast<i32>(state.range(0)));
  std::vector<i32> order(static_cast<std::size_t>(kRows) * kColumns);
  for (auto _ : state) {
#pragma omp parallel for schedule(dynamic)
    for (i32 row = 0; row < kRows; ++row) {
      const auto begin = order.begin() + static_cast<i64>(row) * kColumns;
      std::iota(begin, begin + kColumns, 0);
      std::nth_element(begin, begin + state.range(0), begin + kColumns, problem.before(row));
    }
    benchmark::DoNotOptimize(order.data());
  }
  report(state);
}

BENCHMARK(topk)->Arg(2048)->Arg(13107)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(peer_nth_element)->Arg(2048)->Arg(13107)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
