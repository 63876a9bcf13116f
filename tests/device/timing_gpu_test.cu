#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/device/clocks.hpp"
#include "lacuna/device/peaks.hpp"
#include "lacuna/device/timing.hpp"

namespace {

using lacuna::Buffer, lacuna::Timing, lacuna::TimingOptions;
using i64 = std::int64_t;

constexpr TimingOptions kQuick{50, 15, 0., 5.};  // warm: the clock of an idle GPU rises for a while

/// Spins for `cycles` and leaves how long that was by the other clock.
__global__ void spin(long long cycles, unsigned long long* nanoseconds) {
  unsigned long long begin, end;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  for (const long long start = clock64(); clock64() - start < cycles;) {
  }
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
  *nanoseconds = end - begin;
}
__global__ void count(unsigned* counter) { ++*counter; }
__global__ void read_all(const float4* data, i64 n, float* sums) {
  float sum = 0;
  const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x,
            threads = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = first; i < n; i += threads) sum += data[i].x + data[i].y + data[i].z + data[i].w;
  sums[first] = sum;
}

struct Spin {
  explicit Spin(long long cycles) : cycles(cycles) { device->fill(spent.data(), 0, sizeof(unsigned long long)); }
  void enqueue() const { spin<<<1, 1, 0, static_cast<cudaStream_t>(device->stream())>>>(cycles, spent.data()); }
  double spent_us() const {
    unsigned long long nanoseconds = 0;
    device->copy_out(&nanoseconds, spent.data(), sizeof nanoseconds);
    return static_cast<double>(nanoseconds) / 1e3;
  }
  std::shared_ptr<lacuna::Device> device = lacuna::cuda_device();
  Buffer<unsigned long long> spent{device, 1};
  long long cycles;
};

}  // namespace

TEST_CASE("GPU timing: a kernel that spins takes the time that it spins, as a graph and launched directly") {
  Spin work(2000000);  // about a millisecond
  const Timing graph = lacuna::time_work(*work.device, {[&] { work.enqueue(); }}, false, kQuick);
  const double spent = work.spent_us();
  CHECK(graph.graph);
  CHECK(graph.nodes == 1);
  CHECK(graph.runs == kQuick.runs);
  CHECK_FALSE(graph.launch_bound);
  CHECK(graph.q1_us <= graph.median_us);
  CHECK(graph.median_us <= graph.q3_us);
  CHECK(std::abs(graph.median_us - spent) < .2 * spent);

  const auto waits = [&] {
    work.enqueue();
    work.device->synchronize();  // which a capture refuses
  };
  const Timing direct = lacuna::time_work(*work.device, {waits}, false, kQuick);
  CHECK_FALSE(direct.graph);
  CHECK(direct.nodes == 0);
  CHECK_FALSE(direct.launch_bound);
  CHECK(std::abs(direct.median_us - graph.median_us) < .1 * graph.median_us);
}

TEST_CASE("GPU timing: twice the work takes twice the time, and counts twice the nodes") {
  Spin work(1000000);
  const auto times = [&](int n) {
    const auto several = [&work, n] {
      for (int i = 0; i < n; ++i) work.enqueue();
    };
    return lacuna::time_work(*work.device, {several}, false, kQuick);
  };
  const Timing once = times(1), twice = times(2);
  CHECK(twice.nodes == 2);
  CHECK(twice.median_us / once.median_us == doctest::Approx(2).epsilon(.1));
}

TEST_CASE("GPU timing: the variants are used in turn, each as often as the others") {
  const auto device = lacuna::cuda_device();
  for (const bool waits : {false, true}) {
    constexpr int kVariants = 3;
    Buffer<unsigned> counters(device, kVariants);
    device->fill(counters.data(), 0, kVariants * sizeof(unsigned));
    std::vector<std::function<void()>> variants;
    for (int v = 0; v < kVariants; ++v)
      variants.push_back([&, v] {
        count<<<1, 1, 0, static_cast<cudaStream_t>(device->stream())>>>(counters.data() + v);
        if (waits) device->synchronize();
      });
    const Timing t = lacuna::time_work(*device, variants, /*flush=*/true, {4, 15, 0., 5.});
    std::vector<unsigned> counted(kVariants);
    device->copy_out(counted.data(), counters.data(), kVariants * sizeof(unsigned));
    CHECK(t.graph == !waits);
    // Once each to warm up; what is captured, or refused, does not run.
    CHECK(std::accumulate(counted.begin(), counted.end(), 0u) == kVariants + 4u + 15u);
    const auto [least, most] = std::minmax_element(counted.begin(), counted.end());
    CHECK(*most - *least <= 1);
  }
}

TEST_CASE("GPU timing: a read whose cache was flushed is slower than a warm one") {
  const auto device = lacuna::cuda_device();
  constexpr i64 kFloats = i64{4} << 20;  // 16 MiB
  constexpr int kBlocks = 264, kThreads = 512;
  Buffer<float> data(device, kFloats), sums(device, kBlocks * kThreads);
  device->fill(data.data(), 0, kFloats * sizeof(float));
  const auto read = [&] {
    read_all<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(device->stream())>>>(
        reinterpret_cast<const float4*>(data.data()), kFloats / 4, sums.data());
  };
  const Timing warm = lacuna::time_work(*device, {read}, false, kQuick),
               cold = lacuna::time_work(*device, {read}, true, kQuick);
  CHECK(cold.median_us > 1.1 * warm.median_us);
}

TEST_CASE("GPU timing: empty kernels are launch-bound; least and most seconds hold") {
  const auto device = lacuna::cuda_device();
  Buffer<unsigned> counter(device, 1);
  device->fill(counter.data(), 0, sizeof(unsigned));
  const auto tiny = [&] {
    for (int i = 0; i < 4; ++i) count<<<1, 1, 0, static_cast<cudaStream_t>(device->stream())>>>(counter.data());
  };
  const Timing t = lacuna::time_work(*device, {tiny}, false, {1, 1, .05, 5.});
  CHECK(t.launch_bound);
  CHECK(t.nodes == 4);
  CHECK(t.runs > 50);
  CHECK(lacuna::time_work(*device, {tiny}, false, {5, 1000, 0., 0.}).runs == 1);
}

TEST_CASE("GPU timing: what cannot be timed is refused, and the stream works on") {
  const auto device = lacuna::cuda_device();
  CHECK_THROWS_WITH_AS(lacuna::time_work(*device, {}, false), doctest::Contains("nothing to time"), lacuna::Error);
  CHECK_THROWS_WITH_AS(lacuna::time_work(*device, {[] {}}, false), doctest::Contains("nothing to time"), lacuna::Error);
  const auto fails = [] { throw lacuna::Error({"broken work", "", "", "", ""}); };
  CHECK_THROWS_WITH_AS(lacuna::time_work(*device, {fails}, false), doctest::Contains("broken work"), lacuna::Error);
  Buffer<int> after(device, 16);
  device->fill(after.data(), 0, 16 * sizeof(int));
  device->synchronize();
}

TEST_CASE("GPU peaks are those of a GPU") {
  const auto device = lacuna::cuda_device();
  const lacuna::DevicePeaks p = lacuna::measure_peaks(*device);
  CAPTURE(p.name);
  CAPTURE(p.copy_gb_s);
  CAPTURE(p.read_gb_s);
  CAPTURE(p.gemm_tflop_s);
  CHECK(p.copy_gb_s > 100);
  CHECK(p.copy_gb_s <= 10000);
  CHECK(p.read_gb_s > .8 * p.copy_gb_s);
  CHECK(p.read_gb_s <= 10000);
  // 0: cuBLASLt is not installed.
  CHECK((p.gemm_tflop_s == 0 || (p.gemm_tflop_s > 20 && p.gemm_tflop_s < 5000)));
  CHECK(p.l2_bytes >= (std::size_t{1} << 20));
  CHECK(p.free_bytes <= p.memory_bytes);
  CHECK(p.free_bytes > 0);
  CHECK(p.sms > 0);
  CHECK(device->describe().find(p.name) == 0);
  CHECK_FALSE(p.driver.empty());
  CHECK(p.cuda.find('.') != std::string::npos);
}

TEST_CASE("GPU clocks are read while it works") {
  Spin work(200000000);  // about 0.1 s
  work.enqueue();
  const auto clocks = lacuna::read_clocks(0);
  work.device->synchronize();
  if (!clocks) {
    MESSAGE("NVML is not there");
    return;
  }
  CHECK(clocks->sm_mhz > 0);
  CHECK(clocks->sm_mhz <= clocks->sm_max_mhz);
  CHECK(clocks->memory_mhz > 0);
  CHECK(clocks->watts > 1);
  CHECK(clocks->celsius > 0);
  CHECK(clocks->celsius < 120);
  CHECK_FALSE(clocks->throttle.empty());
  CHECK_FALSE(lacuna::read_clocks(4096).has_value());
}
