#include <cstring>

#include "lacuna/base/error.hpp"
#include "ops/gpu_fixture.hpp"
#include "ops/top_cases.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

std::vector<float> softmax_like(i64 n, unsigned seed, float spread) {
  std::vector<float> out = random_floats(n, seed, spread);
  double sum = 0;
  for (float& x : out) sum += x = std::exp(x);
  for (float& x : out) x = static_cast<float>(x / sum);
  return out;
}

/// The GPU; every call twice, to the same lists.
class GpuTop {
 public:
  GpuTop() : cache_({consecutive(1)}, 8), gpu_({0, 1, 1, 1, 8, 1.f, 0}, cache_, 1, 1), own_(gpu_.kept.size()) {}
  std::vector<std::vector<i32>> take(const TopRows& rows, const std::vector<i32>* k, double p) {
    const float* values = gpu_.put(rows.values);
    const i32 *n = gpu_.put(rows.n), *cap = k ? gpu_.put(*k) : nullptr;
    std::vector<std::vector<i32>> first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      i32* out = gpu_.put(std::vector<i32>(rows.values.size(), kUntaken));
      i32* count = gpu_.put(std::vector<i32>(rows.n.size(), kUntaken));
      REQUIRE(call_top(gpu_.ops, rows, values, n, cap, p, out, count, &gpu_.error) == 0);
      auto lists =
          taken_lists(rows, gpu_.get(out, static_cast<i64>(rows.values.size())), gpu_.get(count, rows.count()));
      if (repeat == 0)
        first = std::move(lists);
      else
        CHECK(lists == first);
    }
    gpu_.kept.resize(own_);  // the arrays of this call are done with
    return first;
  }

 private:
  PagedFixture cache_;
  GpuFixture gpu_;
  std::size_t own_;
};

struct Sides {
  Sides() : cache({consecutive(1)}, 8), cpu({0, 1, 1, 1, 8, 1.f, 0}, cache.view()), gpu(cpu.call.layer, cache, 1, 1) {}
  PagedFixture cache;
  OpsFixture cpu;
  GpuFixture gpu;
};

void check_same_topp(const TopRows& rows, double p, const std::vector<i32>* cap) {
  CAPTURE(p);
  GpuTop gpu;
  CpuTop cpu;
  CHECK(gpu.take(rows, cap, p) == cpu.take(rows, cap, p));
}

}  // namespace

TEST_CASE_TEMPLATE_INVOKE(topk_exact, GpuTop);
TEST_CASE_TEMPLATE_INVOKE(topp_prefix, GpuTop);

TEST_CASE("GPU: topk of long rows") {
  GpuTop gpu;
  std::vector<float> ties = random_floats(131072, 7);
  for (float& x : ties) x = std::round(x * 20.f);
  const TopRows rows({random_floats(131071, 5), softmax_like(131072, 6, 2.f), ties}, 131072);
  for (const i32 k : {1, 2048, 13107, 131072}) check_topk(gpu, rows, k);
  const TopRows million({random_floats(1 << 20, 8)}, 1 << 20);
  for (const i32 k : {3, 100000, 1 << 20}) check_topk(gpu, million, k);
}

TEST_CASE("GPU: topp of sums that round takes what the CPU takes") {
  std::vector<std::vector<float>> content = awkward_rows();
  content.push_back(softmax_like(4097, 3, 3.f));
  content.push_back(softmax_like(8192, 4, 1.f));
  const TopRows rows(content, 8193);
  const std::vector<i32> cap(rows.n.size(), 10);
  for (const double p : {0., 1e-9, 0.3, 0.5, 0.85, 0.95, 0.999, 1.}) {
    check_same_topp(rows, p, nullptr);
    check_same_topp(rows, p, &cap);
  }
  const TopRows long_rows({softmax_like(131072, 6, 2.f), softmax_like(100001, 9, 4.f)}, 131072);
  for (const double p : {0.5, 0.9, 0.99, 1.}) check_same_topp(long_rows, p, nullptr);
}

TEST_CASE("GPU: top_mass takes what the CPU takes") {
  Sides s;
  std::vector<std::vector<float>> content = awkward_rows();
  content.push_back({0.f, -0.f, 0.25f, -kInf, 0.25f, 0.f});
  content.push_back(softmax_like(100001, 9, 4.f));
  content.push_back(std::vector<float>(100000, 0x1p-20f));
  for (std::vector<float>& x : content)
    for (float& v : x)  // few digits, so that sums are exact on both sides
      if (std::isfinite(v)) v = std::round(v * 0x1p20f) * 0x1p-20f;
  for (const i64 stride : {100001, 100352}) {
    const TopRows rows(content, stride);
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
  std::vector<std::vector<float>> content = awkward_rows();
  content.push_back(random_floats(100003, 11));
  content.push_back(std::vector<float>(100000, -0.f));
  std::vector<float> zeros(9999);
  for (std::size_t i = 0; i < zeros.size(); ++i) zeros[i] = i % 3 == 0 ? 0.f : i % 3 == 1 ? -0.f : -kInf;
  content.push_back(zeros);
  const TopRows rows(content, 100003);
  TopRows expected = rows;
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
