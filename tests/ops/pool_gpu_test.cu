#include "ops/gpu_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE("GPU: pool and group_reduce have the CPU's bits") {
  PagedFixture cache({consecutive(1), consecutive(1), consecutive(1), consecutive(1)}, 8);
  const sdk::Layer layer{0, 1, 6, 2, 8, 1.f, 0};
  OpsFixture cpu(layer, cache.view());
  GpuFixture gpu(layer, cache, 1, 1);
  const auto in = random_floats(12 * 1000, 1);
  const std::vector<i32> count = {1000, 7, 0, 1, 999, 500, 1000, 64, 65, 63, 2, 1000};
  const float* device_in = gpu.put(in);
  const i32* device_count = gpu.put(count);
  for (const auto reduce : {sdk::Reduce::sum, sdk::Reduce::mean, sdk::Reduce::max}) {
    for (const i32 kernel : {1, 5, 8, 101}) {
      std::vector<float> expected(in.size(), 9.f);
      float* out = gpu.put(expected);
      REQUIRE(cpu.ops.pool(in.data(), expected.data(), 12, count.data(), 1000, kernel, reduce, &cpu.error) == 0);
      REQUIRE(gpu.ops.pool(device_in, out, 12, device_count, 1000, kernel, reduce, &gpu.error) == 0);
      CHECK(gpu.get(out, 12 * 1000) == expected);
    }
    std::vector<float> expected(4 * 1000, 9.f);
    float* out = gpu.put(expected);
    REQUIRE(cpu.ops.group_reduce(in.data(), expected.data(), 977, 1000, reduce, &cpu.error) == 0);
    REQUIRE(gpu.ops.group_reduce(device_in, out, 977, 1000, reduce, &gpu.error) == 0);
    CHECK(gpu.get(out, 4 * 1000) == expected);
  }
  CHECK(gpu.ops.pool(device_in, nullptr, 3, device_count, 50, 0, sdk::Reduce::max, &gpu.error) != 0);
}

TEST_CASE("GPU: mean_keys and mean_queries have the CPU's bits") {
  for (const auto dtype : {sdk::Dtype::f32, sdk::Dtype::f16, sdk::Dtype::bf16})
    for (const i32 d : {12, 128, 256}) {
      PagedFixture cache({some_positions(140, 290, 1), some_positions(21, 90, 2)}, d, dtype);
      cache.fill(3);
      const sdk::Layer layer{0, 1, 4, 2, d, 1.f, 0};
      OpsFixture cpu(layer, cache.view());
      GpuFixture gpu(layer, cache, 290, 30);
      const QueryFixture queries(dtype, 1, 4, d, 30, 60, 4);
      const sdk::Queries q = gpu.put(queries);
      for (const i32 full : {0, 1}) {
        std::vector<float> keys(static_cast<std::size_t>(2 * 9 * d), 9.f),
            means(static_cast<std::size_t>(4 * 4 * d), 9.f);
        float *device_keys = gpu.put(keys), *device_means = gpu.put(means);
        REQUIRE(cpu.ops.mean_keys(16, full, keys.data(), &cpu.error) == 0);
        REQUIRE(cpu.ops.mean_queries(queries.q, 8, full, means.data(), &cpu.error) == 0);
        REQUIRE(gpu.ops.mean_keys(16, full, device_keys, &gpu.error) == 0);
        REQUIRE(gpu.ops.mean_queries(q, 8, full, device_means, &gpu.error) == 0);
        CHECK(gpu.get(device_keys, 2 * 9 * d) == keys);
        CHECK(gpu.get(device_means, 4 * 4 * d) == means);
      }
    }
}
