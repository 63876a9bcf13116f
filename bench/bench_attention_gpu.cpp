// Attention on the GPU, bf16: dense prefill, block-sparse prefill, paged decode. Each kind of call is held against the
// fp64 oracle on a small odd shape before it is timed. FLOPs = 4 * head_dim * (query, key) pairs read; bytes: K and V.
#include <cmath>

#include "attention_problem.hpp"
#include "gpu_timing.hpp"
#include "lacuna/attention/cuda_attention.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::bench;

constexpr Heads kHeads{32, 8};

/// A problem's arrays on the GPU.
class DeviceProblem {
 public:
  explicit DeviceProblem(const AttentionProblem& host)
      : attention_(host.attention),
        table_(upload(host.table.data(), size(host.table))),
        length_(upload(host.length.data(), size(host.length))),
        position_(upload(host.position.data(), size(host.position))),
        counts_(upload(host.counts.data(), size(host.counts))),
        pieces_(upload(host.pieces.data(), size(host.pieces))),
        zeros_(upload(host.zeros.data(), size(host.zeros))),
        q_(upload(host.rounded.data(), size(host.rounded))),
        k_(upload(host.k.data(), size(host.k))),
        v_(upload(host.v.data(), size(host.v))),
        out_(gpu(), size(host.q)),
        lse_(gpu(), size(host.q) / kHeadDim) {
    attention_.kv.table = table_.data();
    attention_.kv.length = length_.data();
    attention_.kv.position = position_.data();
    attention_.kv.k = k_.data();
    attention_.kv.v = v_.data();
    attention_.q.data = q_.data();
    if (host.attention.read) {
      selection_ = *host.attention.read;
      selection_.piece_count = counts_.data();
      selection_.pieces = pieces_.data();
      selection_.token_count = selection_.exact_sinks = selection_.exact_window = selection_.full = zeros_.data();
      attention_.read = &selection_;
    }
    workspace_bytes_ = plan_cuda_attention(attention_).workspace_bytes;
    workspace_ = Buffer<char>(gpu(), static_cast<i64>(workspace_bytes_));
  }
  DeviceProblem(const DeviceProblem&) = delete;

  void enqueue() const {
    attend_cuda(attention_, out_.data(), lse_.data(), workspace_.data(), workspace_bytes_, gpu()->stream());
  }
  std::vector<float> out() const { return download(out_); }
  std::vector<float> lse() const { return download(lse_); }

 private:
  template <class T>
  static i64 size(const std::vector<T>& v) {
    return static_cast<i64>(v.size());
  }

  Attention attention_;
  sdk::Selection selection_{};
  Buffer<i32> table_, length_, position_, counts_, pieces_, zeros_;
  Buffer<sdk::u16> q_, k_, v_;
  Buffer<float> out_, lse_;
  std::size_t workspace_bytes_ = 0;
  Buffer<char> workspace_;
};

/// Whether the GPU meets its bound against fp64.
bool correct(const AttentionProblem& problem) {
  const DeviceProblem device(problem);
  device.enqueue();
  const std::vector<float> out = device.out(), lse = device.lse();
  std::vector<double> out64(out.size()), lse64(lse.size()), norm(lse.size());
  attend_fp64(problem.attention, out64.data(), lse64.data(), norm.data());
  for (std::size_t n = 0; n < lse.size(); ++n) {
    double squares = 0;
    for (std::size_t c = n * kHeadDim; c < (n + 1) * kHeadDim; ++c)
      squares += (out[c] - out64[c]) * (out[c] - out64[c]);
    if (!(std::abs(lse[n] - lse64[n]) <= 2e-3) || !(std::sqrt(squares) <= 4e-3 * norm[n])) return false;
  }
  return true;
}

/// `density`: of blocks; 1: dense. Decode: one query.
void measure(benchmark::State& state, bool decode, double density) {
  const auto problem = [&](i64 tokens, double share) {
    auto made = std::make_unique<AttentionProblem>(kHeads, tokens, decode ? 1 : tokens);
    made->round_queries();
    if (density < 1) made->select_blocks(share);
    return made;
  };
  constexpr i64 kSmall = 333;
  if (!correct(*problem(kSmall, .5))) {
    state.SkipWithError("the result is outside the bound against the fp64 oracle");
    return;
  }
  const auto host = problem(state.range(0), density);
  const DeviceProblem device(*host);
  // Prefill meets the same data many times; a decode's K and V are larger than the L2 cache.
  const Timing t = time_work(*gpu(), {[&] { device.enqueue(); }}, false);
  if (decode)
    report(state, t, Bound::memory, 4. * kHeads.kv * kHeadDim * static_cast<double>(state.range(0)));
  else
    report(state, t, Bound::compute, 4. * kHeadDim * host->pairs());
}

void dense_prefill(benchmark::State& state) { measure(state, false, 1); }
void block_sparse_prefill(benchmark::State& state) {
  measure(state, false, static_cast<double>(state.range(1)) / 100.);
}
void paged_decode(benchmark::State& state) { measure(state, true, 1); }

BENCHMARK(dense_prefill)->Arg(8192)->Arg(32768)->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK(block_sparse_prefill)->Args({32768, 10})->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
BENCHMARK(paged_decode)->Arg(32768)->Arg(131072)->UseManualTime()->Iterations(1)->Unit(benchmark::kMicrosecond);

}  // namespace

int main(int argc, char** argv) { return lacuna::bench::run_gpu_benchmarks(argc, argv); }
