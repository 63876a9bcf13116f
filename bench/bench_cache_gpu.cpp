// Moves inside the KV cache on the GPU: compaction of K and V rows, in place, as an eviction does it. Bytes: what is
// kept, read and written once.
#include "gpu_timing.hpp"
#include "kv/moves.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::bench;
using sdk::i32;
using sdk::i64;

constexpr i64 kHeads = 8, kTokenBytes = 256;  // head size 128 in 16 bits

/// Keeps every `every`-th token of each head.
struct CompactionProblem {
  CompactionProblem(i64 tokens, i64 every) : tokens(tokens), kept((tokens + every - 1) / every), every(every) {
    for (i64 h = 0; h <= kHeads; ++h) indptr.push_back(h * kept);
    for (i64 h = 0; h < kHeads; ++h)
      for (i64 i = 0; i < kept; ++i) from.push_back(static_cast<i32>(i * every));
    begin.assign(kHeads, 0);
    side = Buffer<std::byte>(gpu(), kHeads * tokens * kTokenBytes);
    device_indptr = upload(indptr.data(), kHeads + 1);
    device_from = upload(from.data(), static_cast<i64>(from.size()));
    device_begin = upload(begin.data(), kHeads);
  }
  CompactionProblem(const CompactionProblem&) = delete;

  void enqueue() {
    moves->gather_side(side.data(), tokens * kTokenBytes, kTokenBytes,
                       {kHeads, device_indptr.data(), device_from.data(), device_begin.data()});
  }

  /// Tokens that name themselves end up where the lists say.
  bool correct() {
    std::vector<std::byte> host(static_cast<std::size_t>(side.size()));
    auto* words = reinterpret_cast<i32*>(host.data());
    constexpr i64 kWords = kTokenBytes / 4;
    for (i64 t = 0; t < kHeads * tokens; ++t)
      for (i64 w = 0; w < kWords; ++w) words[t * kWords + w] = static_cast<i32>(t * kWords + w);
    gpu()->copy_in(side.data(), host.data(), host.size());
    enqueue();
    gpu()->copy_out(host.data(), side.data(), host.size());
    for (i64 h = 0; h < kHeads; ++h)
      for (i64 i = 0; i < kept; ++i)
        for (i64 w = 0; w < kWords; ++w)
          if (words[(h * tokens + i) * kWords + w] != static_cast<i32>((h * tokens + i * every) * kWords + w))
            return false;
    return true;
  }

  i64 tokens, kept, every;
  std::vector<i64> indptr;
  std::vector<i32> from, begin;
  Buffer<std::byte> side;
  Buffer<i64> device_indptr;
  Buffer<i32> device_from, device_begin;
  std::unique_ptr<Moves> moves = make_moves(*gpu());
};

/// Arguments: tokens a head, of which every n-th is kept.
void compaction(benchmark::State& state) {
  if (!CompactionProblem(5001, state.range(1)).correct()) {
    state.SkipWithError("tokens are not where they belong");
    return;
  }
  CompactionProblem problem(state.range(0), state.range(1));
  const Timing t = time_work(*gpu(), {[&] { problem.enqueue(); }}, true);
  report(state, t, Bound::memory, 2. * kHeads * static_cast<double>(problem.kept * kTokenBytes));
}

BENCHMARK(compaction)
    ->Args({131072, 2})
    ->Args({131072, 10})
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMicrosecond);

}  // namespace

int main(int argc, char** argv) { return lacuna::bench::run_gpu_benchmarks(argc, argv); }
