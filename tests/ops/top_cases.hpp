// What top-k and top-p must take on any device: TEST_CASE_TEMPLATE_INVOKE(topk_..., Side). A Side has
//   std::vector<std::vector<i32>> take(rows, k, p)   of each row; top-k where p < 0; k null: no cap. Whatever lies past
//                                                    what was taken must hold kUntaken still.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "ops/ops_fixture.hpp"

namespace lacuna::test {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr i32 kUntaken = -1;

/// Candidates by falling value, ties by rising index.
inline std::vector<i32> ranking(const float* x, i32 n) {
  std::vector<i32> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](i32 i) { return !(x[i] > -kInf); });
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) { return x[a] > x[b]; });
  return order;
}

/// Rows of any length side by side; what lies past a row's end must not be read.
struct TopRows {
  TopRows(const std::vector<std::vector<float>>& content, i64 stride) : stride(stride) {
    values.assign(content.size() * static_cast<std::size_t>(stride), 1e9f);
    for (std::size_t r = 0; r < content.size(); ++r) {
      std::copy(content[r].begin(), content[r].end(),
                values.begin() + static_cast<std::ptrdiff_t>(r * static_cast<std::size_t>(stride)));
      n.push_back(static_cast<i32>(content[r].size()));
    }
  }
  i32 count() const { return static_cast<i32>(n.size()); }
  const float* row(std::size_t r) const { return values.data() + r * static_cast<std::size_t>(stride); }

  i64 stride;
  std::vector<float> values;
  std::vector<i32> n;
};

/// The lists out of the arrays that an operation filled.
inline std::vector<std::vector<i32>> taken_lists(const TopRows& rows, const std::vector<i32>& out,
                                                 const std::vector<i32>& count) {
  std::vector<std::vector<i32>> lists;
  for (std::size_t r = 0; r < count.size(); ++r) {
    const auto begin = out.begin() + static_cast<std::ptrdiff_t>(r) * rows.stride;
    REQUIRE(count[r] >= 0);
    REQUIRE(count[r] <= rows.n[r]);
    lists.emplace_back(begin, begin + count[r]);
    CHECK(std::all_of(begin + count[r], begin + rows.stride, [](i32 i) { return i == kUntaken; }));
  }
  return lists;
}

/// One call of the operation on `ops`, whose memory the pointers are.
inline i32 call_top(sdk::Ops& ops, const TopRows& rows, const float* values, const i32* n, const i32* k, double p,
                    i32* out, i32* count, sdk::Error* error) {
  if (p < 0) return ops.topk(values, rows.count(), rows.stride, n, k, out, count, rows.stride, error);
  return ops.topp(values, rows.count(), rows.stride, n, k, p, out, count, rows.stride, error);
}

/// The CPU.
class CpuTop {
 public:
  CpuTop() : cache_({consecutive(1)}, 8), f_({0, 1, 1, 1, 8, 1.f, 0}, cache_.view()) {}
  std::vector<std::vector<i32>> take(const TopRows& rows, const std::vector<i32>* k, double p) {
    std::vector<i32> out(rows.values.size(), kUntaken), count(rows.n.size(), kUntaken);
    REQUIRE(call_top(f_.ops, rows, rows.values.data(), rows.n.data(), k ? k->data() : nullptr, p, out.data(),
                     count.data(), &f_.error) == 0);
    return taken_lists(rows, out, count);
  }

 private:
  PagedFixture cache_;
  OpsFixture f_;
};

inline std::vector<std::vector<float>> awkward_rows() {
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
  return out;
}

/// Whole numbers over a power of two: sums are exact in any order, and meet p = 0.5.
inline std::vector<std::vector<float>> exact_rows() {
  std::mt19937 rng(4);
  std::vector<std::vector<float>> out;
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<float> x(2001);
    for (float& v : x)
      v = static_cast<float>(kind == 0   ? 1u
                             : kind == 1 ? rng() % 4
                             : kind == 2 ? rng() % 100000
                                         : 1u << (rng() % 16)) *
          0x1p-20f;
    x[7] = -kInf;
    out.push_back(x);
  }
  out.push_back(std::vector<float>(3, 0.f));
  return out;
}

/// The k best of every row, ascending, by sorting.
template <class Side>
void check_topk(Side& side, const TopRows& rows, i32 k) {
  CAPTURE(k);
  const std::vector<i32> ks(rows.n.size(), k);
  const auto found = side.take(rows, &ks, -1.);
  for (std::size_t r = 0; r < rows.n.size(); ++r) {
    CAPTURE(r);
    auto expected = ranking(rows.row(r), rows.n[r]);
    expected.resize(std::min(expected.size(), static_cast<std::size_t>(k)));
    std::sort(expected.begin(), expected.end());
    CHECK(found[r] == expected);
  }
}

TEST_CASE_TEMPLATE_DEFINE("topk: exact, ties to the lower index, -inf never taken, ascending", Side, topk_exact) {
  Side side;
  for (const i64 stride : {5001, 6000}) {
    const TopRows rows(awkward_rows(), stride);
    for (const i32 k : {0, 1, 2, 99, 1000, 2999, 4999, 9001}) check_topk(side, rows, k);
  }
  const TopRows small({{3.f, 1.f, 3.f, 2.f}, {1.f}, std::vector<float>(257, 0.f)}, 300);
  for (const i32 k : {1, 2, 3, 300}) check_topk(side, small, k);
}

TEST_CASE_TEMPLATE_DEFINE("topp: the shortest descending prefix with the crossing element, capped by k", Side,
                          topp_prefix) {
  Side side;
  const TopRows rows(exact_rows(), 2050);
  for (const double p : {0., 1e-9, 0.3, 0.5, 0.85, 0.999, 1.})
    for (const i32 cap : {-1, 10}) {
      CAPTURE(p);
      CAPTURE(cap);
      const std::vector<i32> caps(rows.n.size(), cap);
      const auto found = side.take(rows, cap < 0 ? nullptr : &caps, p);
      for (std::size_t r = 0; r < rows.n.size(); ++r) {
        CAPTURE(r);
        const float* x = rows.row(r);
        const auto order = ranking(x, rows.n[r]);
        double whole = 0, sum = 0;
        for (const i32 i : order) whole += x[i];
        std::vector<i32> expected;
        for (const i32 i : order) {
          if (!(sum < p * whole) || static_cast<i32>(expected.size()) == cap) break;
          sum += x[i];
          expected.push_back(i);
        }
        std::sort(expected.begin(), expected.end());
        CHECK(found[r] == expected);
      }
    }
}

}  // namespace lacuna::test
