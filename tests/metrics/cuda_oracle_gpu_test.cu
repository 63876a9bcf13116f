// The matched oracles on the GPU beside the CPU's on the same layers.
#include "lacuna/metrics/cuda_oracle.hpp"

#include <algorithm>
#include <numeric>

#include "attention/device_attention.hpp"
#include "attention/trace_fixture.hpp"
#include "ops/gpu_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;
using sdk::Dtype;

namespace {

/// A call on the host and its copy on the GPU, with the dense log-sum-exp of both.
struct Sides {
  explicit Sides(const Attention& a) : host(a), gpu(a) {
    const auto rows = static_cast<std::size_t>(a.q.seqs) * static_cast<std::size_t>(a.layer.num_qo_heads * a.q.count);
    std::vector<float> out(rows * static_cast<std::size_t>(a.layer.head_dim));
    lse.resize(rows);
    attend(a, out.data(), lse.data());
    device_lse = Buffer<float>(cuda_device(), static_cast<i64>(rows));
    gpu.device().copy_in(device_lse.data(), lse.data(), rows * sizeof(float));
    gpu.device().synchronize();
  }
  Attention host;
  DeviceAttention gpu;
  std::vector<float> lse;
  Buffer<float> device_lse;
};

struct Shape {
  i32 seqs, heads, kv_heads, dim;
  i64 length, queries;
  i32 q_tile;
  Dtype keys, queries_type;
};

/// Random queries and keys: scattered pages, values that nothing should read.
struct Layer {
  Layer(const Shape& s, unsigned seed)
      : cache(std::vector<std::vector<i32>>(static_cast<std::size_t>(s.seqs * s.kv_heads), consecutive(s.length)),
              s.dim, s.keys),
        query(s.queries_type, s.seqs, s.heads, s.dim, s.queries, s.length - s.queries, seed, 2.f) {
    cache.fill(seed + 1);
    attention.layer = {0, 1, s.heads, s.kv_heads, s.dim, 1.f / std::sqrt(static_cast<float>(s.dim)), 0};
    attention.kv = cache.view();
    attention.q = query.q;
  }
  PagedFixture cache;
  QueryFixture query;
  Attention attention{};
};

const Shape kShapes[] = {
    {1, 4, 4, 64, 333, 333, 64, Dtype::bf16, Dtype::bf16}, {1, 6, 2, 128, 517, 517, 64, Dtype::bf16, Dtype::bf16},
    {1, 7, 1, 128, 300, 101, 16, Dtype::f16, Dtype::f16},  {2, 3, 1, 256, 130, 130, 33, Dtype::bf16, Dtype::bf16},
    {1, 2, 1, 64, 129, 1, 1, Dtype::bf16, Dtype::bf16},    {1, 3, 3, 64, 70, 9, 1, Dtype::f32, Dtype::f32},
    {1, 2, 2, 80, 200, 150, 64, Dtype::bf16, Dtype::f32},  {1, 2, 1, 64, 1, 1, 64, Dtype::bf16, Dtype::bf16},
    {1, 2, 1, 64, 2200, 2200, 64, Dtype::f16, Dtype::f16}, {1, 2, 1, 64, 40, 40, 1000, Dtype::bf16, Dtype::bf16},
};

enum class Exact { none, one_window, any };

OracleRequest random_request(const Attention& a, i32 q_tile, Exact exact, std::mt19937& random) {
  const i64 tiles = (a.q.count + q_tile - 1) / q_tile, length = a.kv.max_length;
  std::vector<RowSet> sets(static_cast<std::size_t>(a.q.seqs * a.layer.num_qo_heads * tiles));
  for (RowSet& set : sets) {
    const unsigned one_in = 1 + random() % 12;
    for (i32 j = 0; j < length; ++j)
      if (random() % one_in == 0) set.slots.push_back(j);
    if (exact == Exact::one_window) set.exact_sinks = 4, set.exact_window = 29;
    if (exact == Exact::any) {
      set.exact_sinks = static_cast<i32>(random() % 9);
      set.exact_window = static_cast<i32>(random() % 4 == 0 ? random() % 3000 : random() % 90);
    }
  }
  return oracle_request(a, sets, q_tile);
}

std::vector<OracleRequest> requests_of(const Attention& a, i32 q_tile, std::mt19937& random) {
  std::vector<OracleRequest> out;
  for (const Exact exact : {Exact::none, Exact::one_window, Exact::any, Exact::one_window, Exact::any, Exact::none})
    out.push_back(random_request(a, q_tile, exact, random));
  out[5].exact_sinks.clear();
  out[5].exact_window.clear();
  OracleRequest few = out[1];  // less than the exact cells, nothing, and more than there is
  for (std::size_t row = 0; row < few.pairs.size(); ++row)
    few.pairs[row] = row % 3 == 0 ? 0 : row % 3 == 1 ? 3 : i64{1} << 40;
  out.push_back(few);
  return out;
}

/// The first row that is off by more than 1e-3 of itself, -1 if none is.
i64 first_difference(const std::vector<double>& found, const std::vector<double>& expected) {
  if (found.size() != expected.size()) return 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    if (!(std::abs(found[i] - expected[i]) <= 1e-6 + 1e-3 * expected[i])) return static_cast<i64>(i);
  return -1;
}

}  // namespace

TEST_CASE("GPU: the matched oracle is the CPU's, with and without exact windows") {
  std::mt19937 random(3);
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.length);
    CAPTURE(shape.dim);
    const Layer layer(shape, static_cast<unsigned>(shape.length));
    Sides s(layer.attention);
    const std::vector<OracleRequest> requests = requests_of(s.host, shape.q_tile, random);
    const auto expected = matched_oracle(s.host, shape.q_tile, s.lse.data(), requests);
    const auto found =
        matched_oracle_cuda(s.gpu.attention, shape.q_tile, s.device_lse.data(), requests, s.gpu.device());
    REQUIRE(found.size() == expected.size());
    for (std::size_t m = 0; m < found.size(); ++m) {
      CAPTURE(m);
      CHECK(first_difference(found[m], expected[m]) == -1);
    }
  }
}

TEST_CASE("GPU: ranges of tiles, and which methods are asked together, do not change an answer") {
  std::mt19937 random(4);
  const Layer layer({1, 6, 2, 64, 517, 400, 16, Dtype::bf16, Dtype::bf16}, 5);
  Sides s(layer.attention);
  const std::vector<OracleRequest> requests = requests_of(s.host, 16, random);
  const auto together = matched_oracle_cuda(s.gpu.attention, 16, s.device_lse.data(), requests, s.gpu.device());
  for (const std::size_t bytes : {1, 1 << 20})  // a tile at a time, and a few
    CHECK(matched_oracle_cuda(s.gpu.attention, 16, s.device_lse.data(), requests, s.gpu.device(), bytes) == together);
  for (std::size_t m = 0; m < requests.size(); ++m)
    CHECK(matched_oracle_cuda(s.gpu.attention, 16, s.device_lse.data(), {requests[m]}, s.gpu.device())[0] ==
          together[m]);
  CHECK(matched_oracle_cuda(s.gpu.attention, 16, s.device_lse.data(), {}, s.gpu.device()).empty());
}

TEST_CASE("GPU: the matched oracle of an eviction is the CPU's") {
  for (const Shape& shape : kShapes) {
    CAPTURE(shape.length);
    CAPTURE(shape.dim);
    const Layer layer(shape, static_cast<unsigned>(shape.length));
    Sides s(layer.attention);
    const i64 most = shape.length - shape.queries;
    for (const i64 cut : {i64{0}, most / 2, most}) {
      CAPTURE(cut);
      std::vector<std::vector<i64>> kept(4);
      for (i64 row = 0; row < s.host.kv.rows; ++row) {
        kept[0].push_back(0);
        kept[1].push_back(cut);
        kept[2].push_back(cut * (row + 1) / (2 * s.host.kv.rows));
        kept[3].push_back(std::min<i64>(cut, 1 + row));
      }
      const auto expected = matched_evict_oracle(s.host, cut, s.lse.data(), kept);
      const auto found = matched_evict_oracle_cuda(s.gpu.attention, cut, s.device_lse.data(), kept, s.gpu.device());
      REQUIRE(found.size() == expected.size());
      for (std::size_t m = 0; m < found.size(); ++m) {
        CAPTURE(m);
        CHECK(first_difference(found[m], expected[m]) == -1);
      }
    }
  }
}

TEST_CASE("GPU: both oracles on the shipped trace") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  const TraceLayer of(trace, trace.info().captured_layers.front());
  std::mt19937 random(6);
  const PagedFixture cache = of.cache(of.tokens);
  Attention a{};
  a.layer = of.layer;
  a.kv = cache.view();
  a.q = of.queries(0, of.tokens);
  {
    Sides s(a);
    const std::vector<OracleRequest> requests = requests_of(a, 64, random);
    const auto expected = matched_oracle(a, 64, s.lse.data(), requests);
    const auto found = matched_oracle_cuda(s.gpu.attention, 64, s.device_lse.data(), requests, s.gpu.device());
    for (std::size_t m = 0; m < found.size(); ++m) CHECK(first_difference(found[m], expected[m]) == -1);
  }
  const i64 cut = of.tokens - 200, later = 150;
  a.q = of.queries(of.tokens - later, later);
  Sides s(a);
  const std::vector<std::vector<i64>> kept(1, std::vector<i64>(static_cast<std::size_t>(a.kv.rows), cut / 10));
  const auto expected = matched_evict_oracle(a, cut, s.lse.data(), kept);
  const auto found = matched_evict_oracle_cuda(s.gpu.attention, cut, s.device_lse.data(), kept, s.gpu.device());
  const i64 of_row = a.layer.group() * later;  // summed over a KV head's queries, where equal tokens may change places
  for (i64 row = 0; row < a.kv.rows; ++row) {
    const auto sum = [&](const std::vector<double>& mass) {
      return std::accumulate(mass.begin() + row * of_row, mass.begin() + (row + 1) * of_row, 0.);
    };
    CHECK(sum(found[0]) == doctest::Approx(sum(expected[0])).epsilon(1e-4));
    CHECK(sum(found[0]) < static_cast<double>(of_row) * 0.9999);
  }
}
