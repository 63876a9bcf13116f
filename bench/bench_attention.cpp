// CPU attention: dense prefill, block-sparse prefill, paged decode. Each case is held against the fp64 oracle before it
// is timed. Counters: FLOP/s = 4 * head_dim * (query, key) pairs read, decode also the bytes of K and V that it reads.
// The peer is OpenBLAS sgemm on the same matrices, whole causal blocks and without any softmax: an upper mark for a
// library built on it.
#include <benchmark/benchmark.h>
#include <cblas.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "lacuna/attention/attention.hpp"

namespace {

using namespace lacuna;
using sdk::i32;
using sdk::i64;

constexpr i32 kHeads = 8, kKvHeads = 2, kHeadDim = 128, kPage = 16, kBlock = 64;

std::vector<float> random_floats(i64 n, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(static_cast<std::size_t>(n));
  for (float& x : out) x = normal(rng);
  return out;
}

/// One sequence in bf16 pages scattered over the pool, and its last `count` tokens' queries.
struct Problem {
  Problem(i64 tokens, i64 count)
      : q(random_floats(kHeads * count * kHeadDim, 1)), length(kKvHeads, static_cast<i32>(tokens)) {
    const i32 pages = static_cast<i32>((tokens + kPage - 1) / kPage);
    table.resize(static_cast<std::size_t>(pages * kKvHeads));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(2));
    position.resize(table.size() * kPage);
    for (std::size_t p = 0; p < table.size(); ++p)
      for (i32 s = 0; s < kPage; ++s)
        position[static_cast<std::size_t>(table[p] * kPage + s)] = static_cast<i32>(p) % pages * kPage + s;
    for (const float x : random_floats(static_cast<i64>(position.size()) * kHeadDim, 3)) k.push_back(sdk::to_bf16(x));
    for (const float x : random_floats(static_cast<i64>(position.size()) * kHeadDim, 4)) v.push_back(sdk::to_bf16(x));
    attention.layer = {0, 1, kHeads, kKvHeads, kHeadDim, 1.f / std::sqrt(static_cast<float>(kHeadDim)), 0};
    attention.kv = {table.data(), length.data(), position.data(), k.data(), v.data(), sdk::Dtype::bf16,
                    kKvHeads,     pages,         kPage,           kHeadDim, length[0]};
    attention.q = {
        q.data(),         sdk::Dtype::f32, 1, kHeads, kHeadDim, count, tokens - count, kHeads * count * kHeadDim,
        count * kHeadDim, kHeadDim};
    out.resize(q.size());
    lse.resize(static_cast<std::size_t>(kHeads * count));
  }
  Problem(const Problem&) = delete;

  /// Keeps in each tile of 64 queries its diagonal block and others at random, `density` of the visible ones.
  void select_blocks(double density) {
    std::mt19937 rng(5);
    sdk::Rows rows{1, kKvHeads,          0, static_cast<i32>((attention.q.count + kBlock - 1) / kBlock), kBlock,
                   0, attention.q.count, 0};
    const auto n = static_cast<std::size_t>(rows.count());
    counts.resize(n);
    zeros.assign(n, 0);
    pieces.assign(n * static_cast<std::size_t>(rows.tiles), 0);
    for (i64 r = 0; r < rows.count(); ++r) {
      std::vector<i32> blocks(static_cast<std::size_t>(rows.tile_of(r)));
      std::iota(blocks.begin(), blocks.end(), 0);
      std::shuffle(blocks.begin(), blocks.end(), rng);
      blocks.resize(static_cast<std::size_t>(std::max(0., std::round(density * (rows.tile_of(r) + 1)) - 1)));
      blocks.push_back(rows.tile_of(r));
      counts[static_cast<std::size_t>(r)] = static_cast<i32>(blocks.size());
      for (std::size_t b = 0; b < blocks.size(); ++b)
        pieces[static_cast<std::size_t>(r * rows.tiles) + b] = blocks[b] * kBlock;
    }
    selection = {rows,         kBlock,       rows.tiles,   0,       counts.data(), pieces.data(), zeros.data(), nullptr,
                 zeros.data(), zeros.data(), zeros.data(), nullptr, nullptr};
    attention.read = &selection;
  }

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

  std::vector<float> q, out, lse;
  std::vector<i32> table, length, position, counts, zeros, pieces;
  std::vector<sdk::u16> k, v;
  sdk::Selection selection{};
  Attention attention{};
};

void measure(benchmark::State& state, Problem& problem) {
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
  Problem problem(state.range(0), state.range(0));
  measure(state, problem);
}
void block_sparse_prefill(benchmark::State& state) {
  Problem problem(state.range(0), state.range(0));
  problem.select_blocks(static_cast<double>(state.range(1)) / 100.);
  measure(state, problem);
}
void paged_decode(benchmark::State& state) {
  Problem problem(state.range(0), 1);
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
