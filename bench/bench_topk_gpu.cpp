// Top-k on the GPU: rows of normal values in cold memory, held against the CPU's choice on a small shape before it is
// timed. Bytes: one read of the values.
#include "attention_problem.hpp"
#include "gpu_timing.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "lacuna/ops/cuda_ops.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::bench;

struct TopkProblem {
  TopkProblem(i32 rows, i64 columns, i32 wanted)
      : rows(rows),
        wanted(wanted),
        columns(columns),
        values(random_floats(rows * columns, 1)),
        n(static_cast<std::size_t>(rows), static_cast<i32>(columns)),
        k(static_cast<std::size_t>(rows), wanted),
        device_values(upload(values.data(), rows * columns)),
        device_n(upload(n.data(), rows)),
        device_k(upload(k.data(), rows)),
        device_out(gpu(), static_cast<i64>(rows) * wanted),
        device_count(gpu(), rows) {
    call.layer = {0, 1, 1, 1, kHeadDim, 1.f, 0};
    call.num_seqs = 1;
    call.on_device = 1;
    call.stream = gpu()->stream();
    ops = std::make_unique<CudaOps>(call, cost, nullptr, 0);  // top-k needs no workspace
  }
  TopkProblem(const TopkProblem&) = delete;

  void enqueue() {
    sdk::Error error{};
    if (ops->topk(device_values.data(), rows, columns, device_n.data(), device_k.data(), device_out.data(),
                  device_count.data(), wanted, &error) != 0)
      throw Error({"top-k failed", "", error.text, "", ""});
  }

  bool correct() {
    std::vector<i32> out(static_cast<std::size_t>(rows) * static_cast<std::size_t>(wanted)),
        count(static_cast<std::size_t>(rows));
    Cost cpu_cost;
    CpuOps cpu(call, cpu_cost);
    sdk::Error error{};
    enqueue();
    return cpu.topk(values.data(), rows, columns, n.data(), k.data(), out.data(), count.data(), wanted, &error) == 0 &&
           download(device_out) == out && download(device_count) == count;
  }

  i32 rows, wanted;
  i64 columns;
  std::vector<float> values;
  std::vector<i32> n, k;
  Buffer<float> device_values;
  Buffer<i32> device_n, device_k, device_out, device_count;
  sdk::Call call{};
  Cost cost;
  std::unique_ptr<CudaOps> ops;
};

/// Arguments: rows, columns, k.
void topk(benchmark::State& state) {
  const auto rows = static_cast<i32>(state.range(0)), wanted = static_cast<i32>(state.range(2));
  if (!TopkProblem(3, 5001, wanted / 16).correct()) {
    state.SkipWithError("the choice differs from the CPU's");
    return;
  }
  TopkProblem problem(rows, state.range(1), wanted);
  const Timing t = time_work(*gpu(), {[&] { problem.enqueue(); }}, true);
  report(state, t, Bound::memory, 4. * rows * static_cast<double>(state.range(1)));
}

BENCHMARK(topk)
    ->Args({32, 131072, 2048})
    ->Args({32, 131072, 13107})
    ->Args({8, 8192, 819})
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMicrosecond);

}  // namespace

int main(int argc, char** argv) { return lacuna::bench::run_gpu_benchmarks(argc, argv); }
