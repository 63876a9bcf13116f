#include <functional>

#include "attention/trace_fixture.hpp"
#include "ops/gpu_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Two sequences of two KV heads, ragged, with gaps.
struct Shape {
  const char* name;
  sdk::Dtype keys, queries;
  i32 group, head_dim;
  i64 tokens, count;
  float key_scale;  // large: logits far beyond what fp32 sums allow
};

const Shape kShapes[] = {
    {"bf16", sdk::Dtype::bf16, sdk::Dtype::bf16, 3, 64, 300, 100, 1.f},
    {"fp16, group 7, d 128", sdk::Dtype::f16, sdk::Dtype::f16, 7, 128, 401, 77, 1.f},
    {"bf16, group 8, d 256, few queries", sdk::Dtype::bf16, sdk::Dtype::bf16, 8, 256, 260, 5, 1.f},
    {"bf16, group 1, one query", sdk::Dtype::bf16, sdk::Dtype::bf16, 1, 128, 700, 1, 1.f},
    {"one token", sdk::Dtype::bf16, sdk::Dtype::bf16, 1, 64, 1, 1, 1.f},
    {"fp32, d 40", sdk::Dtype::f32, sdk::Dtype::f32, 3, 40, 333, 65, 1.f},
    {"fp32, d 256", sdk::Dtype::f32, sdk::Dtype::f32, 2, 256, 150, 33, 1.f},
    {"fp32 queries, bf16 keys", sdk::Dtype::bf16, sdk::Dtype::f32, 2, 128, 200, 40, 1.f},
    {"bf16, unaligned rows", sdk::Dtype::bf16, sdk::Dtype::bf16, 2, 20, 200, 40, 2.f},
    {"bf16, large logits", sdk::Dtype::bf16, sdk::Dtype::bf16, 4, 128, 300, 50, 12.f},
    {"fp16, large logits", sdk::Dtype::f16, sdk::Dtype::f16, 2, 64, 130, 20, 12.f},
};

struct Inputs {
  explicit Inputs(const Shape& s)
      : end(s.tokens + s.tokens / 9 + 1),
        layer{0, 1, 2 * s.group, 2, s.head_dim, 1.f / std::sqrt(static_cast<float>(s.head_dim)), 0},
        cache({some_positions(s.tokens, end, 1), some_positions(s.tokens / 2 + 1, end, 2),
               some_positions(std::min<i64>(s.tokens, 64), end, 3), some_positions(s.tokens - s.tokens / 5, end, 4)},
              s.head_dim, s.keys),
        queries(s.queries, 2, 2 * s.group, s.head_dim, s.count, end - s.count, 5, 2.f) {
    cache.fill(9, s.key_scale);
  }
  i64 end;
  sdk::Layer layer;
  PagedFixture cache;
  QueryFixture queries;
};

// What f leaves in an array of n floats that begins as `fill`, twice with the same bits.
std::vector<float> twice(GpuFixture& gpu, i64 n, float fill, const std::function<void(CudaOps&, float*)>& f) {
  std::vector<float> out[2];
  for (auto& o : out) {
    float* data = gpu.put(std::vector<float>(static_cast<std::size_t>(n), fill));
    gpu.run([&](CudaOps& ops) { f(ops, data); });
    o = gpu.get(data, n);
  }
  CHECK(std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(float)) == 0);
  return out[0];
}

void check_window(OpsFixture& cpu, GpuFixture& gpu, const sdk::Queries& host, const sdk::Queries& device, i64 stride) {
  const i64 n = static_cast<i64>(host.seqs) * host.heads * stride;
  for (const auto reduce : {sdk::Reduce::sum, sdk::Reduce::mean, sdk::Reduce::max}) {
    CAPTURE(static_cast<int>(reduce));
    std::vector<float> columns(static_cast<std::size_t>(n), 5.f), diagonals(columns);
    REQUIRE(cpu.ops.window_mass(host, reduce, columns.data(), diagonals.data(), stride, &cpu.error) == 0);
    float* other = gpu.allocate<float>(n);
    const auto found_columns = twice(gpu, n, 5.f, [&](CudaOps& ops, float* out) {
      REQUIRE(ops.window_mass(device, reduce, out, other, stride, &gpu.error) == 0);
    });
    const auto found_diagonals = twice(gpu, n, 5.f, [&](CudaOps& ops, float* out) {
      REQUIRE(ops.window_mass(device, reduce, other, out, stride, &gpu.error) == 0);
    });
    CHECK(first_difference(found_columns, columns) == -1);
    CHECK(first_difference(found_diagonals, diagonals) == -1);
  }
}

void check_units(OpsFixture& cpu, GpuFixture& gpu, const sdk::Queries& host, const sdk::Queries& device,
                 const sdk::Rows& rows, i32 unit_tokens) {
  const i32 units = (cpu.call.kv.max_length + unit_tokens - 1) / unit_tokens;
  const i64 stride = units + 3, n = rows.count() * stride;
  std::vector<float> expected(static_cast<std::size_t>(n), -kInf);
  sdk::Scores scores{rows, expected.data(), stride, units, unit_tokens, -1};
  cpu.ops.unit_mass(host, scores);
  const auto found = twice(gpu, n, -kInf, [&](CudaOps& ops, float* out) {
    scores.value = out;
    ops.unit_mass(device, scores);
  });
  CHECK(first_difference(found, expected) == -1);
}

void compare_windows(const Shape& s) {
  CAPTURE(s.name);
  const Inputs in(s);
  OpsFixture cpu(in.layer, in.cache.view());
  GpuFixture gpu(in.layer, in.cache, in.end, s.count);
  check_window(cpu, gpu, in.queries.q, gpu.put(in.queries), in.end + 10);
  check_window(cpu, gpu, in.queries.q, gpu.put(in.queries), std::max<i64>(1, s.tokens / 2));  // cut short
}

void compare_units(const Shape& s) {
  CAPTURE(s.name);
  const Inputs in(s);
  OpsFixture cpu(in.layer, in.cache.view());
  GpuFixture gpu(in.layer, in.cache, in.end, s.count);
  const sdk::Queries q = gpu.put(in.queries);
  for (const bool per_query_head : {true, false})
    for (const i32 q_tile : {1, 24, 64, 128})
      for (const i32 unit : {1, 16, 48, 100}) {
        CAPTURE(per_query_head);
        CAPTURE(q_tile);
        CAPTURE(unit);
        sdk::Rows rows =
            rows_of(2, per_query_head ? 2 * s.group : 2, per_query_head, q_tile, s.count, in.queries.q.first_position);
        if (rows.tiles > 3) {
          rows.tile_begin = rows.tiles - 3;
          rows.tiles = 2;
        }
        check_units(cpu, gpu, in.queries.q, q, rows, unit);
      }
}

void compare_reads(const Shape& s) {
  CAPTURE(s.name);
  Inputs in(s);
  const i64 heads = 4 * s.group, stride = s.tokens + 3;
  OpsFixture cpu(in.layer, in.cache.view());
  std::vector<float> lse(static_cast<std::size_t>(heads * s.count));
  for (i64 h = 0; h < heads; ++h)
    for (i64 i = 0; i < s.count; ++i)
      lse[static_cast<std::size_t>(h * s.count + i)] =
          static_cast<float>(lse_of(visible_logits(cpu.call, in.queries.q, h / (2 * s.group), h % (2 * s.group), i)));
  // Dense, sliding; by KV head; by query head with weights; tiles in two batches.
  for (const int kind : {0, 1, 2, 3, 4}) {
    CAPTURE(kind);
    cpu.call.layer.sliding_window = kind == 1 ? 90 : 0;
    GpuFixture gpu(cpu.call.layer, in.cache, in.end, s.count);
    const bool per_query_head = kind >= 3;
    const sdk::Rows rows =
        rows_of(2, per_query_head ? 2 * s.group : 2, per_query_head, 20, s.count, in.queries.q.first_position);
    std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
    for (std::size_t n = 0; n < content.size(); ++n) {
      content[n].pieces = {static_cast<i32>(n), 30, 21, 30};
      content[n].piece_weight = {0.5f, -0.5f, 0.25f, 3.f};
      content[n].tokens = {45, 1, 150, 45, 35};
      content[n].token_weight = {1.f, 2.f, -1.f, 7.f, 5.f};
      content[n].sinks = static_cast<i32>(n % 3);
      content[n].window = static_cast<i32>(n % 4) * 10;
      content[n].full = n % 11 == 7 && kind == 2;
    }
    const SelectionFixture selection(rows, 16, content, per_query_head);
    std::vector<float> columns(static_cast<std::size_t>(heads * stride), 1.f);
    REQUIRE(cpu.ops.read_mass({kind >= 2 ? &selection.selection : nullptr, in.queries.q, nullptr, lse.data()},
                              columns.data(), stride, &cpu.error) == 0);
    const sdk::Selection on_device = gpu.put(selection);
    const sdk::Attended attended{kind >= 2 ? &on_device : nullptr, gpu.put(in.queries), nullptr, gpu.put(lse)};
    const auto found = twice(gpu, heads * stride, 1.f, [&](CudaOps& ops, float* out) {
      REQUIRE(ops.read_mass(attended, out, stride, &gpu.error) == 0);
    });
    CHECK(first_difference(found, columns) == -1);
    if (kind != 4) continue;
    // The smallest workspace that does: a tile of lists at a time.
    std::vector<float> start(static_cast<std::size_t>(heads * stride), 1.f);
    float* out = gpu.put(start);
    for (std::size_t bytes = 4096;; bytes += 4096) {
      REQUIRE(bytes <= gpu.workspace_bytes);
      i32 failed = 0;
      gpu.run([&](CudaOps& ops) { failed = ops.read_mass(attended, out, stride, &gpu.error); }, bytes);
      if (failed) {
        CHECK(std::string(gpu.error.text).find("workspace is too small") != std::string::npos);
        CHECK(gpu.get(out, heads * stride) == start);
        continue;
      }
      CHECK(first_difference(gpu.get(out, heads * stride), columns) == -1);
      break;
    }
  }
}

}  // namespace

TEST_CASE("GPU: window_mass equals the CPU's") {
  for (const Shape& s : kShapes) compare_windows(s);
}

TEST_CASE("GPU: unit_mass equals the CPU's, for ranges of tiles, query heads and KV heads") {
  for (const Shape& s : kShapes) compare_units(s);
}

TEST_CASE("GPU: read_mass equals the CPU's: dense, a sliding window, lists with overlaps, weights, sinks and windows") {
  for (const Shape& s : kShapes) compare_reads(s);
}

// Small enough for the sanitizers, with more than one block of everything.
TEST_CASE("GPU: masses of a small cache") {
  for (const Shape& s : {Shape{"small", sdk::Dtype::bf16, sdk::Dtype::bf16, 3, 64, 90, 21, 1.f},
                         Shape{"small, large logits", sdk::Dtype::f16, sdk::Dtype::f16, 2, 16, 70, 5, 40.f}}) {
    compare_windows(s);
    compare_units(s);
    compare_reads(s);
  }
}

TEST_CASE("GPU: masses of queries before every key are zero or untouched") {
  PagedFixture cache({{50, 51}}, 16, sdk::Dtype::bf16);
  cache.fill(1);
  const sdk::Layer layer{0, 1, 1, 1, 16, 0.25f, 0};
  GpuFixture gpu(layer, cache, 60, 3);
  const QueryFixture queries(sdk::Dtype::bf16, 1, 1, 16, 3, 10, 2);
  const sdk::Queries q = gpu.put(queries);
  CHECK(twice(gpu, 4, 5.f, [&](CudaOps& ops, float* out) {
          REQUIRE(ops.window_mass(q, sdk::Reduce::sum, out, nullptr, 4, &gpu.error) == 0);
        }) == std::vector<float>(4, 0.f));
  sdk::Scores scores{rows_of(1, 1, true, 3, 3, 10), nullptr, 2, 2, 1, -1};
  CHECK(twice(gpu, 2, -kInf, [&](CudaOps& ops, float* out) {
          scores.value = out;
          ops.unit_mass(q, scores);
        }) == std::vector<float>(2, -kInf));
}

TEST_CASE("GPU: masses of the shipped trace, in every captured layer") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  for (const int index : trace.info().captured_layers) {
    CAPTURE(index);
    const TraceLayer t(trace, index);
    const i64 n = std::min<i64>(t.tokens, 1500);
    const PagedFixture cache = t.cache(n);
    OpsFixture cpu(t.layer, cache.view());
    GpuFixture gpu(t.layer, cache, n, 64);
    const sdk::Queries host = t.queries(n - 64, 64);
    sdk::Queries device = host;  // from the first of these queries to the end of the last head's
    const i64 bytes = ((host.heads - 1) * host.head_stride + 64 * host.row_stride) * sdk::size_of(host.dtype);
    const auto* begin = static_cast<const unsigned char*>(host.data);
    device.data = gpu.put(std::vector<unsigned char>(begin, begin + bytes));
    check_window(cpu, gpu, host, device, n);
    check_units(cpu, gpu, host, device, rows_of(1, t.layer.num_kv_heads, false, 64, 64, n - 64), 16);
    check_units(cpu, gpu, host, device, rows_of(1, t.layer.num_qo_heads, true, 1, 64, n - 64), 1);
  }
}

TEST_CASE("GPU: a captured graph replays to the same bits") {
  const Inputs in(kShapes[0]);
  GpuFixture gpu(in.layer, in.cache, in.end, 100);
  const sdk::Queries q = gpu.put(in.queries);
  const i64 stride = in.end, rows = 12;
  float* columns = gpu.allocate<float>(rows * stride);
  i32* taken = gpu.allocate<i32>(rows * stride);
  i32* count = gpu.allocate<i32>(rows);
  const i32* n = gpu.put(std::vector<i32>(rows, static_cast<i32>(stride)));
  const i32* k = gpu.put(std::vector<i32>(rows, 40));
  const auto step = [&](CudaOps& ops) {
    REQUIRE(ops.window_mass(q, sdk::Reduce::sum, columns, nullptr, stride, &gpu.error) == 0);
    REQUIRE(ops.topk(columns, rows, stride, n, k, taken, count, stride, &gpu.error) == 0);
  };
  gpu.run(step);
  const auto masses = gpu.get(columns, rows * stride);
  const auto indices = gpu.get(taken, 40);

  const auto stream = static_cast<cudaStream_t>(gpu.device->stream());
  CudaOps ops(gpu.call, gpu.cost, gpu.workspace, gpu.workspace_bytes);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  step(ops);
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
  for (int replay = 0; replay < 3; ++replay) {
    gpu.device->fill(columns, 0xff, static_cast<std::size_t>(rows * stride) * sizeof(float));
    gpu.device->fill(taken, 0xff, static_cast<std::size_t>(rows * stride) * sizeof(i32));
    gpu.device->fill(gpu.workspace, 0xff, gpu.workspace_bytes);
    REQUIRE(cudaGraphLaunch(executable, stream) == cudaSuccess);
    CHECK(gpu.get(columns, rows * stride) == masses);
    CHECK(gpu.get(taken, 40) == indices);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

TEST_CASE("GPU: what does not fit is named") {
  PagedFixture wide({consecutive(4)}, 320, sdk::Dtype::bf16);
  wide.fill(1);
  const QueryFixture queries(sdk::Dtype::bf16, 1, 1, 320, 2, 2, 2);
  GpuFixture gpu({0, 1, 1, 1, 320, 1.f, 0}, wide, 4, 2);
  float* out = gpu.allocate<float>(4);
  CHECK(gpu.ops.window_mass(gpu.put(queries), sdk::Reduce::sum, out, nullptr, 4, &gpu.error) != 0);
  CHECK(std::string(gpu.error.text).find("256") != std::string::npos);
}
