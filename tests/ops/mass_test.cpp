#include <omp.h>

#include "ops/ops_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

constexpr i64 kStride = 700;

// Two sequences, ragged heads with gaps, longer than one task of keys.
struct Ragged {
  Ragged()
      : cache({some_positions(600, 680, 1), some_positions(333, 680, 2), some_positions(64, 680, 3),
               some_positions(650, 680, 4)},
              40, sdk::Dtype::bf16),
        q_data(random_floats(2 * 6 * 100 * 40, 5, 2.f)),
        q(queries_of(q_data, 2, 6, 40, 100, 570)) {
    cache.fill(9, 2.f);
  }
  PagedFixture cache;
  std::vector<float> q_data;
  sdk::Queries q;
  sdk::Layer layer{0, 1, 6, 2, 40, 0.16f, 0};
};

}  // namespace

TEST_CASE("window_mass: columns and diagonals of every query's softmax") {
  const Ragged r;
  OpsFixture f(r.layer, r.cache.view());
  for (const auto reduce : {sdk::Reduce::sum, sdk::Reduce::mean, sdk::Reduce::max}) {
    CAPTURE(static_cast<int>(reduce));
    std::vector<float> columns(12 * kStride, 5.f), diagonals(12 * kStride, 5.f);
    REQUIRE(f.ops.window_mass(r.q, reduce, columns.data(), diagonals.data(), kStride, &f.error) == 0);
    for (i64 head = 0; head < 12; ++head) {
      std::vector<double> column(kStride), diagonal(kStride);
      const auto add = [&](double& to, double p) {
        to = reduce == sdk::Reduce::max ? std::max(to, p) : to + p / (reduce == sdk::Reduce::mean ? 100. : 1.);
      };
      for (i64 i = 0; i < 100; ++i) {
        const auto p = softmax_of(visible_logits(f.call, r.q, head / 6, head % 6, i));
        for (std::size_t s = 0; s < p.size(); ++s) {
          add(column[s], p[s]);
          add(diagonal[static_cast<std::size_t>(570 + i - f.call.kv.position_of(head / 3, static_cast<i64>(s)))], p[s]);
        }
      }
      for (i64 s = 0; s < kStride; ++s) {
        REQUIRE(near(columns[static_cast<std::size_t>(head * kStride + s)], column[static_cast<std::size_t>(s)]));
        REQUIRE(near(diagonals[static_cast<std::size_t>(head * kStride + s)], diagonal[static_cast<std::size_t>(s)]));
      }
    }
  }
  CHECK(f.cost.flops > 0);
  CHECK(f.cost.bytes > 0);
}

TEST_CASE("window_mass of queries before every key is zero") {
  PagedFixture cache({{50, 51}}, 16);
  cache.fill(1);
  OpsFixture f({0, 1, 1, 1, 16, 0.25f, 0}, cache.view());
  const auto q = random_floats(3 * 16, 2);
  std::vector<float> columns(4, 5.f);
  REQUIRE(f.ops.window_mass(queries_of(q, 1, 1, 16, 3, 10), sdk::Reduce::sum, columns.data(), nullptr, 4, &f.error) ==
          0);
  CHECK(columns == std::vector<float>(4, 0.f));
}

TEST_CASE("read_mass adds exp(logit - lse) over the cells that attention read") {
  const Ragged r;
  OpsFixture f(r.layer, r.cache.view());
  std::vector<float> lse(12 * 100);
  for (i64 head = 0; head < 12; ++head)
    for (i64 i = 0; i < 100; ++i)
      lse[static_cast<std::size_t>(head * 100 + i)] =
          static_cast<float>(lse_of(visible_logits(f.call, r.q, head / 6, head % 6, i)));

  for (const int kind : {0, 1, 2}) {  // dense, a selection by KV head, by query head with weights
    CAPTURE(kind);
    const bool per_query_head = kind == 2;
    const sdk::Rows rows = rows_of(2, per_query_head ? 6 : 2, per_query_head, 32, 100, 570);
    std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
    for (std::size_t n = 0; n < content.size(); ++n) {
      content[n].pieces = {static_cast<i32>(n), 30};
      content[n].piece_weight = {0.5f, -0.5f};
      content[n].tokens = {1, 45};
      content[n].token_weight = {1.f, 2.f};
      content[n].sinks = static_cast<i32>(n % 3);
      content[n].window = static_cast<i32>(n % 4) * 10;
    }
    const SelectionFixture selection(rows, 16, content, kind == 2);
    const sdk::Attended attended{kind ? &selection.selection : nullptr, r.q, nullptr, lse.data()};
    std::vector<float> columns(12 * kStride, 1.f);
    REQUIRE(f.ops.read_mass(attended, columns.data(), kStride, &f.error) == 0);
    for (i64 head = 0; head < 12; ++head) {
      std::vector<double> expected(kStride, 1.);
      for (i64 i = 0; i < 100; ++i) {
        const auto logits = visible_logits(f.call, r.q, head / 6, head % 6, i);
        const i64 slot = static_cast<i64>(logits.size()) - 1,
                  row = (per_query_head ? head : head / 3) * rows.tiles + i / 32;
        const i64 tile_last =
            static_cast<i64>(visible_logits(f.call, r.q, head / 6, head % 6, rows.query_end(row) - 1).size());
        const RowSet set = expand_row(selection.selection, row, tile_last);
        for (i64 s = 0; s <= slot; ++s) {
          const auto member = std::lower_bound(set.slots.begin(), set.slots.end(), s);
          const bool listed = member != set.slots.end() && *member == s;
          if (kind && !listed && s >= set.exact_sinks && slot - s >= set.exact_window) continue;
          const double weight = listed && !set.log_weight.empty()
                                    ? set.log_weight[static_cast<std::size_t>(member - set.slots.begin())]
                                    : 0;
          expected[static_cast<std::size_t>(s)] += std::exp(logits[static_cast<std::size_t>(s)] + (kind ? weight : 0) -
                                                            lse[static_cast<std::size_t>(head * 100 + i)]);
        }
      }
      for (i64 s = 0; s < kStride; ++s)
        REQUIRE(near(columns[static_cast<std::size_t>(head * kStride + s)], expected[static_cast<std::size_t>(s)]));
    }
  }
}

TEST_CASE("read_mass of one query whose group shares a pass") {
  const Ragged r;
  OpsFixture f(r.layer, r.cache.view());
  sdk::Queries one = r.q;
  one.count = 1;
  std::vector<float> lse, columns(12 * kStride, 0.f);
  for (i64 head = 0; head < 12; ++head)
    lse.push_back(static_cast<float>(lse_of(visible_logits(f.call, one, head / 6, head % 6, 0))));
  REQUIRE(f.ops.read_mass({nullptr, one, nullptr, lse.data()}, columns.data(), kStride, &f.error) == 0);
  for (i64 head = 0; head < 12; ++head) {
    const auto p = softmax_of(visible_logits(f.call, one, head / 6, head % 6, 0));
    for (std::size_t s = 0; s < p.size(); ++s)
      REQUIRE(near(columns[static_cast<std::size_t>(head * kStride) + s], p[s]));
  }
}

TEST_CASE("unit_mass: the true mass of every unit, for ranges of tiles, query heads and KV heads") {
  const Ragged r;
  OpsFixture f(r.layer, r.cache.view());
  const float untouched = -std::numeric_limits<float>::infinity();
  for (const bool per_query_head : {true, false})
    for (const i32 q_tile : {1, 70, 100}) {
      CAPTURE(per_query_head);
      CAPTURE(q_tile);
      sdk::Rows rows = rows_of(2, per_query_head ? 6 : 2, per_query_head, q_tile, 100, 570);
      if (q_tile == 1) {
        rows.tile_begin = 90;
        rows.tiles = 7;
      }
      std::vector<float> value(static_cast<std::size_t>(rows.count() * 50), untouched);
      sdk::Scores scores{rows, value.data(), 50, 44, 16, -1};
      f.ops.unit_mass(r.q, scores);
      for (i64 row = 0; row < rows.count(); ++row) {
        std::vector<double> expected(50);
        i64 seen = 0;
        const i64 heads = per_query_head ? 1 : 3;
        for (i64 h = rows.head_of(row) * heads; h < (rows.head_of(row) + 1) * heads; ++h)
          for (i64 i = rows.query_begin(row); i < rows.query_end(row); ++i) {
            const auto p = softmax_of(visible_logits(f.call, r.q, rows.seq_of(row), h, i));
            for (std::size_t s = 0; s < p.size(); ++s) expected[s / 16] += p[s];
            seen = std::max<i64>(seen, static_cast<i64>(p.size()));
          }
        for (i64 u = 0; u < 50; ++u) {
          const float found = value[static_cast<std::size_t>(row * 50 + u)];
          if (u * 16 >= seen)
            REQUIRE(found == untouched);
          else
            REQUIRE(near(found, expected[static_cast<std::size_t>(u)]));
        }
      }
    }
}

TEST_CASE("sums over queries have the same bits on one thread and on two") {
  const Ragged r;
  OpsFixture f(r.layer, r.cache.view());
  const int threads = omp_get_max_threads();
  std::vector<float> columns[2], diagonals[2], units[2];
  for (int t = 0; t < 2; ++t) {
    omp_set_num_threads(t + 1);
    columns[t].assign(12 * kStride, 0.f);
    diagonals[t].assign(12 * kStride, 0.f);
    units[t].assign(12 * 2 * 44, 0.f);
    REQUIRE(f.ops.window_mass(r.q, sdk::Reduce::sum, columns[t].data(), diagonals[t].data(), kStride, &f.error) == 0);
    sdk::Scores scores{rows_of(2, 6, true, 64, 100, 570), units[t].data(), 44, 44, 16, -1};
    f.ops.unit_mass(r.q, scores);
  }
  omp_set_num_threads(threads);
  CHECK(columns[0] == columns[1]);
  CHECK(diagonals[0] == diagonals[1]);
  CHECK(units[0] == units[1]);
}
