#include "lacuna/ops/row_set.hpp"

#include <doctest/doctest.h>

#include <random>
#include <set>

#include "attention/paged_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

bool reads(const RowSet& set, i64 s, i64 j) {
  return j <= s && (std::binary_search(set.slots.begin(), set.slots.end(), static_cast<i32>(j)) ||
                    j < set.exact_sinks || s - j < set.exact_window);
}

RowSet random_set(unsigned seed, i64 n) {
  std::mt19937 rng(seed);
  RowSet out;
  for (i64 s = 0; s < n; ++s)
    if (rng() % 4 == 0) out.slots.push_back(static_cast<i32>(s));
  out.exact_sinks = static_cast<i32>(rng() % 3 == 0 ? rng() % 70 : 0);
  out.exact_window = static_cast<i32>(rng() % 2 == 0 ? rng() % 70 : 0);
  return out;
}

}  // namespace

TEST_CASE("pairs, touched and cells count what the definition reads") {
  for (unsigned seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    const RowSet set = random_set(seed, 100);
    for (const auto& [begin, end] : {std::pair<i64, i64>{0, 1}, {0, 100}, {37, 64}, {99, 100}, {50, 50}}) {
      i64 pairs = 0;
      std::set<i32> cells;
      for (i64 s = begin; s < end; ++s)
        for (i64 j = 0; j < 100; ++j)
          if (reads(set, s, j)) {
            ++pairs;
            cells.insert(static_cast<i32>(j));
          }
      CHECK(set.pairs(begin, end) == pairs);
      CHECK(set.touched(begin, end) == static_cast<i64>(cells.size()));
      CHECK(set.cells(begin, end) == std::vector<i32>(cells.begin(), cells.end()));
    }
  }
}

TEST_CASE("expand_row: a sorted union, pieces decide weights, lists are cut at the visible end") {
  SelectionFixture::Row row;
  row.pieces = {20, 3, 5, 96};
  row.piece_weight = {1.f, 2.f, 3.f, 4.f};
  row.tokens = {50, 4, 0, 99, 22};
  row.token_weight = {-1.f, -2.f, -3.f, -4.f, -5.f};
  row.sinks = 2;
  row.window = 7;
  const SelectionFixture weighted(rows_of(1, 1, true, 1, 1, 97), 4, {row}, true),
      plain(rows_of(1, 1, true, 1, 1, 97), 4, {row});
  const std::vector<i32> slots = {0, 3, 4, 5, 6, 7, 8, 20, 21, 22, 23, 50, 96, 97};
  const RowSet set = expand_row(weighted.selection, 0, 98);
  CHECK(set.slots == slots);
  CHECK(set.log_weight == std::vector<float>{-3, 2, 2, 2, 2, 3, 3, 1, 1, 1, 1, -1, 4, 4});
  CHECK(set.exact_sinks == 2);
  CHECK(set.exact_window == 7);
  CHECK(expand_row(plain.selection, 0, 98).slots == slots);
  CHECK(expand_row(plain.selection, 0, 98).log_weight.empty());

  row.full = 1;
  const SelectionFixture full(rows_of(1, 1, true, 1, 1, 97), 4, {row}, true);
  CHECK(expand_row(full.selection, 0, 98).slots == consecutive(98));
  CHECK(expand_row(full.selection, 0, 98).log_weight.empty());
  CHECK(expand_row(SelectionFixture(rows_of(1, 1, true, 1, 1, 97), 0, {SelectionFixture::Row{}}).selection, 0, 98)
            .slots.empty());
}

TEST_CASE("unite is the union of what the heads read") {
  const RowSet a = random_set(2, 100), b = random_set(8, 100), c = random_set(11, 100);
  const RowSet all = unite({&a, &b, &c});
  CHECK(all.log_weight.empty());
  for (i64 s = 0; s < 100; ++s)
    for (i64 j = 0; j < 100; ++j) REQUIRE(reads(all, s, j) == (reads(a, s, j) || reads(b, s, j) || reads(c, s, j)));
}
