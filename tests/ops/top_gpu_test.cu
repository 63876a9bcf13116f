#include <cstring>
#include <numeric>

#include "lacuna/base/error.hpp"
#include "ops/gpu_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> softmax_like(i64 n, unsigned seed, float spread) {
  std::vector<float> out = random_floats(n, seed, spread);
  double sum = 0;
  for (float& x : out) sum += x = std::exp(x);
  for (float& x : out) x = static_cast<float>(x / sum);
  return out;
}

// Rows of many kinds; what lies past a row's end must not be read.
std::vector<std::vector<float>> inputs() {
  std::mt19937 rng(1);
  std::vector<std::vector<float>> out;
  out.push_back(random_floats(5000, 2));
  out.push_back(std::vector<float>(3000, 1.5f));  // all equal
  std::vector<float> few(4000), close(4000), odd(1000);
  for (float& x : few) x = static_cast<float>(rng() % 5);
  for (float& x : close) x = 1.f + static_cast<float>(rng() % 4096) * 0x1p-23f;  // differ in the last digits alone
  for (float& x : odd) {
    const float kinds[] = {kInf, -kInf, 0.f, -0.f, std::numeric_limits<float>::quiet_NaN(), -3.f, 1e-42f, -1e38f, 7.f};
    x = kinds[rng() % 9];
  }
  out.push_back(few);
  out.push_back(close);
  out.push_back(odd);
  out.push_back(std::vector<float>(100, -kInf));
  out.push_back({4.f});
  out.push_back({});
  out.push_back(softmax_like(4097, 3, 3.f));
  out.push_back(softmax_like(8192, 4, 1.f));
  return out;
}

struct Rows {
  explicit Rows(const std::vector<std::vector<float>>& content, i64 stride) : stride(stride) {
    values.assign(content.size() * static_cast<std::size_t>(stride), 1e9f);
    for (std::size_t r = 0; r < content.size(); ++r) {
      std::copy(content[r].begin(), content[r].end(),
                values.begin() + static_cast<std::ptrdiff_t>(r * static_cast<std::size_t>(stride)));
      n.push_back(static_cast<i32>(content[r].size()));
    }
  }
  i32 count() const { return static_cast<i32>(n.size()); }
  i64 stride;
  std::vector<float> values;
  std::vector<i32> n;
};

// topk (p < 0) or topp on both sides; the first row that differs, -1 if none does.
int first_difference(OpsFixture& cpu, GpuFixture& gpu, const Rows& rows, const std::vector<i32>* k, double p) {
  const std::size_t size = rows.values.size();
  std::vector<i32> out(size, -1), count(rows.n.size(), -1);
  const auto run = [&](sdk::Ops& ops, const float* v, const i32* n, const i32* cap, i32* o, i32* c, sdk::Error* e) {
    if (p < 0) return ops.topk(v, rows.count(), rows.stride, n, cap, o, c, rows.stride, e);
    return ops.topp(v, rows.count(), rows.stride, n, cap, p, o, c, rows.stride, e);
  };
  REQUIRE(run(cpu.ops, rows.values.data(), rows.n.data(), k ? k->data() : nullptr, out.data(), count.data(),
              &cpu.error) == 0);
  const float* values = gpu.put(rows.values);
  const i32 *n = gpu.put(rows.n), *cap = k ? gpu.put(*k) : nullptr;
  for (int repeat = 0; repeat < 2; ++repeat) {
    i32* taken = gpu.put(std::vector<i32>(size, -1));
    i32* taken_count = gpu.put(std::vector<i32>(rows.n.size(), -1));
    REQUIRE(run(gpu.ops, values, n, cap, taken, taken_count, &gpu.error) == 0);
    const auto found = gpu.get(taken, static_cast<i64>(size));
    const auto found_count = gpu.get(taken_count, rows.count());
    for (int r = 0; r < rows.count(); ++r) {
      const std::size_t at = static_cast<std::size_t>(r * rows.stride), row = static_cast<std::size_t>(r);
      if (found_count[row] != count[row] ||
          std::memcmp(found.data() + at, out.data() + at, static_cast<std::size_t>(rows.stride) * sizeof(i32)) != 0)
        return r;
    }
  }
  gpu.kept.resize(6);  // the arrays of this comparison are done with
  return -1;
}

struct Sides {
  Sides() : cache({consecutive(1)}, 8), cpu({0, 1, 1, 1, 8, 1.f, 0}, cache.view()), gpu(cpu.call.layer, cache, 1, 1) {}
  PagedFixture cache;
  OpsFixture cpu;
  GpuFixture gpu;
};

}  // namespace

TEST_CASE("GPU: topk takes what the CPU takes") {
  Sides s;
  for (const i64 stride : {8193, 9000}) {
    const Rows rows(inputs(), stride);
    for (const i32 k : {0, 1, 2, 99, 1000, 2999, 8191, 9001}) {
      CAPTURE(k);
      const std::vector<i32> ks(rows.n.size(), k);
      CHECK(first_difference(s.cpu, s.gpu, rows, &ks, -1.) == -1);
    }
  }
  const Rows small({{3.f, 1.f, 3.f, 2.f}, {1.f}, std::vector<float>(257, 0.f)}, 300);  // few threads
  for (const i32 k : {1, 2, 3, 300}) {
    const std::vector<i32> ks(3, k);
    CHECK(first_difference(s.cpu, s.gpu, small, &ks, -1.) == -1);
  }
}

TEST_CASE("GPU: topk of long rows") {
  Sides s;
  std::vector<float> ties = random_floats(131072, 7);
  for (float& x : ties) x = std::round(x * 20.f);
  const Rows rows({random_floats(131071, 5), softmax_like(131072, 6, 2.f), ties}, 131072);
  for (const i32 k : {1, 2048, 13107, 131072}) {
    CAPTURE(k);
    const std::vector<i32> ks(3, k);
    CHECK(first_difference(s.cpu, s.gpu, rows, &ks, -1.) == -1);
  }
  const Rows million({random_floats(1 << 20, 8)}, 1 << 20);
  for (const i32 k : {3, 100000, 1 << 20}) {
    const std::vector<i32> ks(1, k);
    CHECK(first_difference(s.cpu, s.gpu, million, &ks, -1.) == -1);
  }
}

TEST_CASE("GPU: topp takes what the CPU takes") {
  Sides s;
  std::vector<std::vector<float>> content = inputs();
  std::mt19937 rng(4);
  for (int kind = 0; kind < 4; ++kind) {  // whole numbers over a power of two: sums are exact, and meet p = 0.5
    std::vector<float> x(2001);
    for (float& v : x)
      v = static_cast<float>(kind == 0   ? 1u
                             : kind == 1 ? rng() % 4
                             : kind == 2 ? rng() % 100000
                                         : 1u << (rng() % 16)) *
          0x1p-20f;
    x[7] = -kInf;
    content.push_back(x);
  }
  content.push_back(std::vector<float>(3, 0.f));
  const Rows rows(content, 8193);
  for (const double p : {0., 1e-9, 0.3, 0.5, 0.85, 0.95, 0.999, 1.}) {
    CAPTURE(p);
    CHECK(first_difference(s.cpu, s.gpu, rows, nullptr, p) == -1);
    const std::vector<i32> cap(rows.n.size(), 10);
    CHECK(first_difference(s.cpu, s.gpu, rows, &cap, p) == -1);
  }
  const Rows long_rows({softmax_like(131072, 6, 2.f), softmax_like(100001, 9, 4.f)}, 131072);
  for (const double p : {0.5, 0.9, 0.99, 1.}) CHECK(first_difference(s.cpu, s.gpu, long_rows, nullptr, p) == -1);
}

TEST_CASE("GPU: top_mass takes what the CPU takes") {
  Sides s;
  std::vector<std::vector<float>> content = inputs();
  content.push_back({0.f, -0.f, 0.25f, -kInf, 0.25f, 0.f});
  content.push_back(softmax_like(100001, 9, 4.f));
  content.push_back(std::vector<float>(100000, 0x1p-20f));
  for (std::vector<float>& x : content)
    for (float& v : x)  // few digits, so that sums are exact on both sides
      if (std::isfinite(v)) v = std::round(v * 0x1p20f) * 0x1p-20f;
  for (const i64 stride : {100001, 100352}) {
    const Rows rows(content, stride);
    for (const double share : {-1., 0., 1e-6, 0.3, 0.5, 0.95, 1., 2.}) {
      CAPTURE(share);
      std::vector<double> target;
      for (i32 r = 0; r < rows.count(); ++r) {
        double positive = 0;
        for (i32 i = 0; i < rows.n[static_cast<std::size_t>(r)]; ++i)
          if (const float v = rows.values[static_cast<std::size_t>(r * stride + i)]; v > 0 && std::isfinite(v))
            positive += v;
        target.push_back(share == 2. ? positive + 1. : share * positive);
      }
      std::vector<i32> out(rows.values.size(), -1), count(rows.n.size(), -1);
      s.cpu.ops.top_mass(rows.values.data(), rows.count(), stride, rows.n.data(), target.data(), out.data(),
                         count.data(), stride);
      i32* taken = s.gpu.put(std::vector<i32>(rows.values.size(), -1));
      i32* taken_count = s.gpu.put(std::vector<i32>(rows.n.size(), -1));
      s.gpu.ops.top_mass(s.gpu.put(rows.values), rows.count(), stride, s.gpu.put(rows.n), s.gpu.put(target), taken,
                         taken_count, stride);
      CHECK(s.gpu.get(taken_count, rows.count()) == count);
      CHECK(s.gpu.get(taken, static_cast<i64>(out.size())) == out);
      s.gpu.kept.resize(6);
    }
  }
  CHECK_THROWS_AS(s.gpu.ops.top_mass(nullptr, 1, (1 << 20) + 1, nullptr, nullptr, nullptr, nullptr, 1), Error);
}

TEST_CASE("GPU: rank_normalise writes the CPU's bits, whatever number of rows the workspace holds") {
  Sides s;
  std::vector<std::vector<float>> content = inputs();
  content.push_back(random_floats(100003, 11));
  content.push_back(std::vector<float>(100000, -0.f));
  std::vector<float> zeros(9999);
  for (std::size_t i = 0; i < zeros.size(); ++i) zeros[i] = i % 3 == 0 ? 0.f : i % 3 == 1 ? -0.f : -kInf;
  content.push_back(zeros);
  const Rows rows(content, 100003);
  Rows expected = rows;
  s.cpu.ops.rank_normalise(expected.values.data(), rows.count(), rows.stride, rows.n.data());
  const i32* n = s.gpu.put(rows.n);
  for (const i64 room : {1, 3, 32}) {
    CAPTURE(room);
    const std::size_t bytes = CudaOps::workspace_bytes({0, 1, static_cast<i32>(room), 1, 8, 1.f, 0}, 1, rows.stride, 1);
    Buffer<unsigned char> workspace(s.gpu.device, static_cast<i64>(bytes));
    CudaOps ops(s.gpu.call, s.gpu.cost, workspace.data(), bytes);
    float* values = s.gpu.put(rows.values);
    ops.rank_normalise(values, rows.count(), rows.stride, n);
    const auto found = s.gpu.get(values, static_cast<i64>(rows.values.size()));
    CHECK(std::memcmp(found.data(), expected.values.data(), found.size() * sizeof(float)) == 0);
  }
  CudaOps without(s.gpu.call, s.gpu.cost, s.gpu.workspace, 256);
  float* values = s.gpu.put(rows.values);
  CHECK_THROWS_WITH_AS(without.rank_normalise(values, rows.count(), rows.stride, n), doctest::Contains("256 bytes"),
                       Error);
}
