// CPU attention: dense prefill, block-sparse prefill, paged decode. Each case is held against the fp64 oracle before it
// is timed. Counters: FLOP/s = 4 * head_dim * (query, key) pairs read, decode also the bytes of K and V that it reads.
// The peer is OpenBLAS sgemm on the same matrices, whole causal blocks and without any softmax: an upper mark for a
// library built on it.
#include <benchmark/benchmark.h>
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_problem.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::bench;

constexpr i32 kHeads = 8, kKvHeads = 2;

struct CpuProblem : AttentionProblem {
  CpuProblem(i64 tokens, i64 count)
      : AttentionProblem({kHeads, kKvHeads}, tokens, count), out(q.size()), lse(q.size() / kHeadDim) {}

  /// Whether fp32 meets its bound against fp64.
  bool correct() {
    attend(attention, out.data(), lse.data());
    std::vector<double> out64(out.size()), lse64(lse.size()), norm(lse.size());
    attend_fp64(attention, out64.data(), lse64.data(), norm.data());
    for (std::size_t n = 0; n < lse.size(); ++n) {
      double squares = 0;
      for (std::size_t c = n * kHeadDim; c < (n + 1) * kHeadDim; ++c)
        squares += (out[c] - out64[c]) * (out[c] - out64[c]);
      if (!(std::abs(lse[n] - lse64[n]) <= 4e-6 * std::max(1., std::abs(lse64[n]))) ||
          !(std::sqrt(squares) <= 2e-5 * norm[n]))
        return false;
    }
    return true;
  }

  std::vector<float> out, lse;
};

void measure(benchmark::State& state, CpuProblem& problem) {
  if (!problem.correct()) {
    state.SkipWithError("the result is outside the bound against the fp64 oracle");
    return;
  }
  AttentionWork work;
  for (auto _ : state) {
    work = attend(problem.attention, problem.out.data(), problem.lse.data());
    benchmark::DoNotOptimize(problem.out.data());
  }
  state.counters["FLOP/s"] =
      benchmark::Counter(4. * kHeadDim * static_cast<double>(work.pairs), benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::kIs1000);
  state.counters["threads"] = omp_get_max_threads();
}

void dense_prefill(benchmark::State& state) {
  CpuProblem problem(state.range(0), state.range(0));
  measure(state, problem);
}
void block_sparse_prefill(benchmark::State& state) {
  CpuProblem problem(state.range(0), state.range(0));
  problem.select_blocks(static_cast<double>(state.range(1)) / 100.);
  measure(state, problem);
}
void paged_decode(benchmark::State& state) {
  CpuProblem problem(state.range(0), 1);
  measure(state, problem);
  state.counters["bytes/s"] =
      benchmark::Counter(4. * kKvHeads * kHeadDim * static_cast<double>(state.range(0)),
                         benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

// Scores and outputs of every tile of 64 queries against the keys up to its diagonal block.
void peer_sgemm_causal(benchmark::State& state) {
  const i64 tokens = state.range(0);
  const auto q = random_floats(kHeads * tokens * kHeadDim, 1), k = random_floats(kKvHeads * tokens * kHeadDim, 2),
             v = random_floats(kKvHeads * tokens * kHeadDim, 3);
  std::vector<float> scores(static_cast<std::size_t>(kBlock * tokens)), out(q.size());
  for (auto _ : state) {
    for (i64 head = 0; head < kHeads; ++head)
      for (i64 begin = 0; begin < tokens; begin += kBlock) {
        const int keys = static_cast<int>(begin + kBlock);
        const i64 row = head * tokens + begin, kv = head / (kHeads / kKvHeads) * tokens;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, kBlock, keys, kHeadDim, 1.f, q.data() + row * kHeadDim,
                    kHeadDim, k.data() + kv * kHeadDim, kHeadDim, 0.f, scores.data(), keys);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, kBlock, kHeadDim, keys, 1.f, scores.data(), keys,
                    v.data() + kv * kHeadDim, kHeadDim, 0.f, out.data() + row * kHeadDim, kHeadDim);
      }
    benchmark::DoNotOptimize(out.data());
  }
  state.counters["FLOP/s"] =
      benchmark::Counter(4. * kHeadDim * kHeads * static_cast<double>(tokens * (tokens + 1) / 2),
                         benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

BENCHMARK(dense_prefill)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(block_sparse_prefill)->Args({2048, 10})->Args({2048, 25})->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(paged_decode)->Arg(8192)->Unit(benchmark::kMicrosecond)->UseRealTime();
BENCHMARK(peer_sgemm_causal)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
