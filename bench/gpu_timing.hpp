// Google Benchmark cases whose time is measured by time_work: one iteration, the median of event-timed graph replays.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/device/clocks.hpp"
#include "lacuna/device/peaks.hpp"
#include "lacuna/device/timing.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna::bench {

inline const std::shared_ptr<Device>& gpu() {
  static const std::shared_ptr<Device> device = cuda_device();
  return device;
}
inline const DevicePeaks& peaks() {
  static const DevicePeaks measured = measure_peaks(*gpu());
  return measured;
}

/// Device memory with the bytes of a host array.
template <class T>
Buffer<T> upload(const T* from, sdk::i64 n) {
  Buffer<T> out(gpu(), std::max<sdk::i64>(n, 1));
  if (n > 0) gpu()->copy_in(out.data(), from, static_cast<std::size_t>(n) * sizeof(T));
  return out;
}
template <class T>
std::vector<T> download(const Buffer<T>& from) {
  std::vector<T> out(static_cast<std::size_t>(from.size()));
  gpu()->copy_out(out.data(), from.data(), out.size() * sizeof(T));
  return out;
}

enum class Bound { memory, compute };

/// `amount`: bytes or FLOPs of the work. Counters: the rate in GB/s or TFLOP/s, its share of the measured peak
/// (streaming read, bf16 product) in %, quartiles over the median, SM clock, and whether the case is launch-bound.
inline void report(benchmark::State& state, const Timing& t, Bound bound, double amount) {
  for (auto _ : state) state.SetIterationTime(t.median_us * 1e-6);
  const bool memory = bound == Bound::memory;
  const double rate = amount / t.median_us / (memory ? 1e3 : 1e6),
               peak = memory ? peaks().read_gb_s : peaks().gemm_tflop_s;
  state.counters[memory ? "GB/s" : "TFLOP/s"] = rate;
  if (peak > 0) state.counters[memory ? "%read" : "%gemm"] = 100 * rate / peak;
  state.counters["q1/med"] = t.q1_us / t.median_us;
  state.counters["q3/med"] = t.q3_us / t.median_us;
  state.counters["nodes"] = t.nodes;
  state.counters["launch_bound"] = t.launch_bound;
}

/// main() of such a program: 77 where there is no GPU.
inline int run_gpu_benchmarks(int argc, char** argv) {
  constexpr int kNoGpu = 77;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  try {
    gpu();
  } catch (const Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return kNoGpu;
  }
  const DevicePeaks& p = peaks();
  benchmark::AddCustomContext("gpu", p.name + ", driver " + p.driver + ", CUDA " + p.cuda);
  benchmark::AddCustomContext("copy GB/s", std::to_string(p.copy_gb_s));
  benchmark::AddCustomContext("read GB/s", std::to_string(p.read_gb_s));
  benchmark::AddCustomContext("bf16 GEMM TFLOP/s", std::to_string(p.gemm_tflop_s));
  if (const auto clocks = read_clocks(0)) {
    benchmark::AddCustomContext("SM MHz", std::to_string(clocks->sm_mhz) + " of " + std::to_string(clocks->sm_max_mhz));
    benchmark::AddCustomContext("throttled", clocks->throttle);
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace lacuna::bench
