#include <cstring>
#include <numeric>

#include "ops/ops_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Candidates by falling value, ties by rising index.
std::vector<i32> ranking(const float* x, i32 n) {
  std::vector<i32> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](i32 i) { return !(x[i] > -kInf); });
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) { return x[a] > x[b]; });
  return order;
}

std::vector<std::vector<float>> inputs() {
  std::mt19937 rng(1);
  std::vector<std::vector<float>> out;
  out.push_back(random_floats(5000, 2));
  out.push_back(std::vector<float>(3000, 1.5f));  // all equal
  std::vector<float> few(4000), close(4000), odd(1000);
  for (float& x : few) x = static_cast<float>(rng() % 5);
  for (float& x : close) x = 1.f + static_cast<float>(rng() % 4096) * 0x1p-23f;  // differ in the last digits alone
  for (std::size_t i = 0; i < odd.size(); ++i) {
    const float kinds[] = {kInf, -kInf, 0.f, -0.f, std::numeric_limits<float>::quiet_NaN(), -3.f, 1e-42f, -1e38f, 7.f};
    odd[i] = kinds[rng() % 9];
  }
  out.push_back(few);
  out.push_back(close);
  out.push_back(odd);
  out.push_back(std::vector<float>(100, -kInf));
  out.push_back({4.f});
  out.push_back({});
  return out;
}

// The rows one under the other; what lies past a row's end must not be read.
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
  const float* row(i64 r) const { return values.data() + r * stride; }
  i64 stride;
  std::vector<float> values;
  std::vector<i32> n;
};

}  // namespace

TEST_CASE("topk: exact, ties to the lower index, -inf never taken, ascending") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  const Rows rows(inputs(), 5001);
  for (const i32 k : {0, 1, 2, 99, 1000, 2999, 6000}) {
    CAPTURE(k);
    const std::vector<i32> ks(rows.n.size(), k);
    std::vector<i32> out(rows.values.size(), -1), count(rows.n.size(), -1);
    REQUIRE(f.ops.topk(rows.values.data(), rows.count(), rows.stride, rows.n.data(), ks.data(), out.data(),
                       count.data(), rows.stride, &f.error) == 0);
    for (i32 r = 0; r < rows.count(); ++r) {
      CAPTURE(r);
      const auto row = static_cast<std::size_t>(r);
      auto expected = ranking(rows.row(r), rows.n[row]);
      expected.resize(std::min(expected.size(), static_cast<std::size_t>(k)));
      std::sort(expected.begin(), expected.end());
      const auto begin = out.begin() + static_cast<std::ptrdiff_t>(r * rows.stride);
      CHECK(std::vector<i32>(begin, begin + count[row]) == expected);
    }
  }
}

TEST_CASE("topp: the shortest descending prefix with the crossing element, capped by k") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  std::mt19937 rng(4);
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<float> x(2001);  // whole numbers over a power of two: sums are exact in any order, and meet p = 0.5
    for (float& v : x)
      v = static_cast<float>(kind == 0   ? 1u
                             : kind == 1 ? rng() % 4
                             : kind == 2 ? rng() % 100000
                                         : 1u << (rng() % 16)) *
          0x1p-20f;
    x[7] = -kInf;
    const i32 n = static_cast<i32>(x.size());
    const auto order = ranking(x.data(), n);
    double whole = 0;
    for (const i32 i : order) whole += x[static_cast<std::size_t>(i)];
    for (const double p : {0., 0.3, 0.5, 0.85, 0.999, 1.})
      for (const i32 cap : {-1, 10}) {
        CAPTURE(kind);
        CAPTURE(p);
        std::vector<i32> expected;
        double sum = 0;
        for (const i32 i : order) {
          if (!(sum < p * whole) || static_cast<i32>(expected.size()) == cap) break;
          sum += x[static_cast<std::size_t>(i)];
          expected.push_back(i);
        }
        std::sort(expected.begin(), expected.end());
        std::vector<i32> out(x.size());
        i32 count = -1;
        REQUIRE(f.ops.topp(x.data(), 1, n, &n, cap < 0 ? nullptr : &cap, p, out.data(), &count, n, &f.error) == 0);
        out.resize(static_cast<std::size_t>(count));
        CHECK(out == expected);
      }
  }
  const float zeros[3] = {};
  const i32 n = 3;
  i32 out[3], count = -1;
  REQUIRE(f.ops.topp(zeros, 1, 3, &n, nullptr, 0.9, out, &count, 3, &f.error) == 0);
  CHECK(count == 0);
}

TEST_CASE("top_mass: the shortest descending prefix that reaches each row's target") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  std::vector<std::vector<float>> content = inputs();
  for (std::vector<float>& x : content)
    for (float& v : x)
      if (std::isfinite(v)) v = std::round(v * 64.f) * 0x1p-10f;  // exact sums, -0 among the values
  content.push_back({0.f, -0.f, 0.25f, -kInf, 0.25f, 0.f});
  const Rows rows(content, 5001);
  for (const double share : {-1., 0., 1e-3, 0.3, 0.5, 1., 1.5}) {  // of what is above 0
    CAPTURE(share);
    std::vector<double> target;
    std::vector<std::vector<i32>> expected;
    for (i32 r = 0; r < rows.count(); ++r) {
      const float* x = rows.row(r);
      const std::vector<i32> order = ranking(x, rows.n[static_cast<std::size_t>(r)]);
      double positive = 0, sum = 0;
      for (const i32 i : order)
        if (x[i] > 0 && std::isfinite(x[i])) positive += x[i];
      target.push_back(share == 1.5 ? positive + 1 : share * positive);
      std::vector<i32>& row = expected.emplace_back();
      for (const i32 i : order) {
        if (!(sum < target.back())) break;
        sum += x[i];
        row.push_back(i);
      }
      std::sort(row.begin(), row.end());
    }
    std::vector<i32> out(rows.values.size(), -1), count(rows.n.size(), -1);
    f.ops.top_mass(rows.values.data(), rows.count(), rows.stride, rows.n.data(), target.data(), out.data(),
                   count.data(), rows.stride);
    for (i32 r = 0; r < rows.count(); ++r) {
      CAPTURE(r);
      const auto begin = out.begin() + static_cast<std::ptrdiff_t>(r * rows.stride);
      CHECK(std::vector<i32>(begin, begin + count[static_cast<std::size_t>(r)]) ==
            expected[static_cast<std::size_t>(r)]);
    }
  }
}

TEST_CASE("rank_normalise: ranks over the row's length in place of finite values, all else as it was") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  Rows rows(inputs(), 5001);
  std::vector<float> expected = rows.values;
  for (i32 r = 0; r < rows.count(); ++r) {
    const i32 n = rows.n[static_cast<std::size_t>(r)];
    const std::vector<i32> order = ranking(rows.row(r), n);
    for (std::size_t rank = 0; rank < order.size(); ++rank)
      if (const i64 at = r * rows.stride + order[rank]; std::isfinite(expected[static_cast<std::size_t>(at)]))
        expected[static_cast<std::size_t>(at)] = 1.f - static_cast<float>(rank) / static_cast<float>(n);
  }
  f.ops.rank_normalise(rows.values.data(), rows.count(), rows.stride, rows.n.data());
  CHECK(std::memcmp(rows.values.data(), expected.data(), expected.size() * sizeof(float)) == 0);
}

TEST_CASE("make_ops: the CPU's for a call on the CPU, without a workspace") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  CHECK(ops_workspace_bytes(false, f.call.layer, 1, 1000, 1000) == 0);
  const std::unique_ptr<CoreOps> ops = make_ops(f.call, f.cost, nullptr, 0);
  CHECK(dynamic_cast<CpuOps*>(ops.get()) != nullptr);
}
