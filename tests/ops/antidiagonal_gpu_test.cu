#include "attention/trace_fixture.hpp"
#include "ops/gpu_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

constexpr float kUntouched = -1.f;

// Compares with the CPU, and two runs bit by bit.
void check_estimate(OpsFixture& cpu, GpuFixture& gpu, const sdk::Queries& host, const sdk::Queries& device,
                    const sdk::Rows& rows, i32 stride) {
  const i32 units = (cpu.call.kv.max_length + rows.q_tile - 1) / rows.q_tile;
  const i64 n = rows.count() * (units + 1);
  std::vector<float> expected(static_cast<std::size_t>(n), kUntouched), found[2];
  sdk::Scores scores{rows, expected.data(), units + 1, units, rows.q_tile, -1};
  REQUIRE(cpu.ops.antidiagonal_mass(host, stride, scores, &cpu.error) == 0);
  for (auto& f : found) {
    scores.value = gpu.put(std::vector<float>(static_cast<std::size_t>(n), kUntouched));
    gpu.run([&](CudaOps& ops) { REQUIRE(ops.antidiagonal_mass(device, stride, scores, &gpu.error) == 0); });
    f = gpu.get(scores.value, n);
  }
  CHECK(first_difference(found[0], expected) == -1);
  CHECK(found[0] == found[1]);
}

}  // namespace

TEST_CASE("GPU: antidiagonal_mass equals the CPU's") {
  struct Shape {
    sdk::Dtype keys, queries;
    i32 group, head_dim, q_tile, stride;
    i64 tokens;
    float scale;
  };
  const auto bf16 = sdk::Dtype::bf16, f16 = sdk::Dtype::f16, f32 = sdk::Dtype::f32;
  for (const Shape& s : std::initializer_list<Shape>{{bf16, bf16, 2, 64, 32, 4, 203, 2.f},
                                                     {bf16, bf16, 4, 128, 128, 16, 520, 2.f},
                                                     {f16, f16, 1, 64, 64, 1, 130, 2.f},
                                                     {bf16, bf16, 3, 64, 96, 8, 777, 2.f},
                                                     {bf16, bf16, 7, 64, 160, 2, 333, 2.f},
                                                     {bf16, bf16, 2, 128, 64, 8, 150, 14.f},
                                                     {f32, f32, 2, 20, 32, 4, 99, 4.f},
                                                     {bf16, f32, 1, 256, 64, 16, 70, 2.f},
                                                     {bf16, bf16, 1, 64, 32, 32, 1, 2.f}}) {
    CAPTURE(s.q_tile);
    CAPTURE(s.stride);
    CAPTURE(s.tokens);
    PagedFixture cache({consecutive(s.tokens), consecutive(s.tokens)}, s.head_dim, s.keys);
    cache.fill(3, s.scale);
    const sdk::Layer layer{0, 1, 2 * s.group, 2, s.head_dim, 0.7f, 0};
    const QueryFixture queries(s.queries, 1, 2 * s.group, s.head_dim, s.tokens, 0, 4, s.scale);
    OpsFixture cpu(layer, cache.view());
    GpuFixture gpu(layer, cache, s.tokens, s.tokens);
    sdk::Rows rows = rows_of(1, 2 * s.group, true, s.q_tile, s.tokens, 0);
    check_estimate(cpu, gpu, queries.q, gpu.put(queries), rows, s.stride);
    if (rows.tiles < 3) continue;
    rows.tile_begin = rows.tiles - 2;
    rows.tiles = 2;
    check_estimate(cpu, gpu, queries.q, gpu.put(queries), rows, s.stride);
  }
}

TEST_CASE("GPU: antidiagonal_mass of the shipped trace") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  for (const int index : trace.info().captured_layers) {
    CAPTURE(index);
    const TraceLayer t(trace, index);
    const i64 n = std::min<i64>(t.tokens, 1000);
    const PagedFixture cache = t.cache(n);
    OpsFixture cpu(t.layer, cache.view());
    GpuFixture gpu(t.layer, cache, n, n);
    const sdk::Queries host = t.queries(0, n);
    sdk::Queries device = host;
    const auto* begin = static_cast<const unsigned char*>(host.data);
    device.data = gpu.put(std::vector<unsigned char>(
        begin, begin + ((host.heads - 1) * host.head_stride + n * host.row_stride) * sdk::size_of(host.dtype)));
    check_estimate(cpu, gpu, host, device, rows_of(1, t.layer.num_qo_heads, true, 128, n, 0), 16);
  }
}

TEST_CASE("GPU: antidiagonal_mass names what does not fit") {
  PagedFixture cache({consecutive(64)}, 16);
  cache.fill(1);
  GpuFixture gpu({0, 1, 1, 1, 16, 1.f, 0}, cache, 64, 64);
  const QueryFixture queries(sdk::Dtype::f32, 1, 1, 16, 64, 0, 2);
  sdk::Scores scores{rows_of(1, 1, true, 32, 64, 0), gpu.allocate<float>(4), 2, 2, 32, -1};
  CHECK(gpu.ops.antidiagonal_mass(gpu.put(queries), 5, scores, &gpu.error) != 0);
  CHECK(std::string(gpu.error.text).find("stride") != std::string::npos);
}
