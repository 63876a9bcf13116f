#include "ops/top_cases.hpp"

#include <cstring>

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE_TEMPLATE_INVOKE(topk_exact, CpuTop);
TEST_CASE_TEMPLATE_INVOKE(topp_prefix, CpuTop);

TEST_CASE("top_mass: the shortest descending prefix that reaches each row's target") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  std::vector<std::vector<float>> content = awkward_rows();
  for (std::vector<float>& x : content)
    for (float& v : x)
      if (std::isfinite(v)) v = std::round(v * 64.f) * 0x1p-10f;  // exact sums, -0 among the values
  content.push_back({0.f, -0.f, 0.25f, -kInf, 0.25f, 0.f});
  const TopRows rows(content, 5001);
  for (const double share : {-1., 0., 1e-3, 0.3, 0.5, 1., 1.5}) {  // of what is above 0
    CAPTURE(share);
    std::vector<double> target;
    std::vector<std::vector<i32>> expected;
    for (i32 r = 0; r < rows.count(); ++r) {
      const float* x = rows.row(static_cast<std::size_t>(r));
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
  TopRows rows(awkward_rows(), 5001);
  std::vector<float> expected = rows.values;
  for (i32 r = 0; r < rows.count(); ++r) {
    const i32 n = rows.n[static_cast<std::size_t>(r)];
    const std::vector<i32> order = ranking(rows.row(static_cast<std::size_t>(r)), n);
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
