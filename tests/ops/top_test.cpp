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

}  // namespace

TEST_CASE("topk: exact, ties to the lower index, -inf never taken, ascending") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  const auto rows = inputs();
  const i64 stride = 5001;
  std::vector<float> values(rows.size() * stride, 1e9f);  // what lies past a row's end must not be read
  std::vector<i32> n;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    std::copy(rows[r].begin(), rows[r].end(), values.begin() + static_cast<std::ptrdiff_t>(r * stride));
    n.push_back(static_cast<i32>(rows[r].size()));
  }
  for (const i32 k : {0, 1, 2, 99, 1000, 2999, 6000}) {
    CAPTURE(k);
    const std::vector<i32> ks(rows.size(), k);
    std::vector<i32> out(rows.size() * stride, -1), count(rows.size(), -1);
    REQUIRE(f.ops.topk(values.data(), static_cast<i32>(rows.size()), stride, n.data(), ks.data(), out.data(),
                       count.data(), stride, &f.error) == 0);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      CAPTURE(r);
      auto expected = ranking(values.data() + r * stride, n[r]);
      expected.resize(std::min(expected.size(), static_cast<std::size_t>(k)));
      std::sort(expected.begin(), expected.end());
      const auto begin = out.begin() + static_cast<std::ptrdiff_t>(r * stride);
      CHECK(std::vector<i32>(begin, begin + count[r]) == expected);
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
