#include "attention/bound.hpp"
#include "lacuna/base/error.hpp"

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE("set_mass is the dense probability over the set, and its logarithm the change of lse") {
  PagedFixture cache({consecutive(300), consecutive(300)}, 64, sdk::Dtype::bf16);
  cache.fill(71, 4.f);
  constexpr i64 kCount = 150;
  const auto q = random_floats(4 * kCount * 64, 72);
  Attention a{{0, 1, 4, 2, 64, 0.125f, 0}, cache.view(), queries_of(q, 1, 4, 64, kCount, 150)};
  const Reference dense = oracle(a);
  const Result fp32 = run(a);

  for (const i32 q_tile : {1, 32, 128}) {
    const sdk::Rows rows = rows_of(1, 4, true, q_tile, kCount, 150);
    std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
    for (std::size_t r = 0; r < content.size(); ++r) {
      content[r].pieces = {static_cast<i32>(r % 90), static_cast<i32>(r % 90 + 20)};
      content[r].tokens = {3, 120, static_cast<i32>(130 + r % 100)};
      content[r].sinks = static_cast<i32>(r % 3);
      content[r].window = static_cast<i32>(r % 5) * 20;
    }
    const SelectionFixture selection(rows, 32, content);
    a.read = &selection.selection;
    std::vector<RowSet> sets;
    for (i64 r = 0; r < rows.count(); ++r) sets.push_back(expand_row(selection.selection, r, 150 + rows.query_end(r)));
    std::vector<double> mass(static_cast<std::size_t>(4 * kCount));
    set_mass(a, sets, q_tile, fp32.lse.data(), mass.data());
    const Reference sparse = oracle(a);
    for (std::size_t n = 0; n < mass.size(); ++n) {
      const double expected = std::exp(sparse.lse[n] - dense.lse[n]);
      CHECK(mass[n] <= 1.);
      CHECK(mass[n] == doctest::Approx(expected).epsilon(2e-5));
    }
  }
  a.read = nullptr;
  CHECK_THROWS_AS(set_mass(a, {}, 1, fp32.lse.data(), nullptr), Error);
}
