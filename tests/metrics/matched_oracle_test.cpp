#include "lacuna/metrics/matched_oracle.hpp"

#include <doctest/doctest.h>
#include <omp.h>

#include "lacuna/ops/simd.hpp"
#include "random_layer.hpp"

using namespace lacuna;
using lacuna::test::RandomLayer;
using sdk::i32;
using sdk::i64;

namespace {

struct Cells {
  i64 pairs = 0;
  double mass = 0;
};

Cells cells(const RandomLayer& layer, const RowSet& set, i64 head, i64 begin, i64 end) {
  Cells sum;
  for (i64 i = begin; i < end; ++i) {
    for (i64 j = 0; j < layer.length; ++j) {
      if (!layer.reads(set, i, j)) continue;
      ++sum.pairs;
      sum.mass += layer.probability(head, i, j);
    }
  }
  return sum;
}

RowSet columns(unsigned bits, i32 sinks = 0, i32 window = 0) {
  RowSet set;
  for (i32 j = 0; j < 32; ++j)
    if (bits >> j & 1) set.slots.push_back(j);
  set.exact_sinks = sinks;
  set.exact_window = window;
  return set;
}

RowSet random_set(std::mt19937& random, i64 length, bool exact) {
  RowSet set;
  const unsigned one_in = 2 + random() % 6;
  for (i32 j = 0; j < length; ++j)
    if (random() % one_in == 0) set.slots.push_back(j);
  if (exact) {
    set.exact_sinks = static_cast<i32>(random() % 5);
    set.exact_window = static_cast<i32>(random() % 40);
  }
  return set;
}

/// The bound as it is defined: cells outside `exact` column by column, by density, the last one in part.
double definition(const RandomLayer& layer, const RowSet& exact, i64 pairs, i64 head, i64 begin, i64 end) {
  const Cells held = cells(layer, exact, head, begin, end);
  std::vector<Cells> columns;
  for (i32 j = 0; j < layer.length; ++j) {
    RowSet with = exact;
    with.slots.push_back(j);
    const Cells more = cells(layer, with, head, begin, end);
    if (more.pairs > held.pairs) columns.push_back({more.pairs - held.pairs, more.mass - held.mass});
  }
  std::sort(columns.begin(), columns.end(), [](const Cells& a, const Cells& b) {
    return a.mass * static_cast<double>(b.pairs) > b.mass * static_cast<double>(a.pairs);
  });
  double mass = held.mass;
  i64 left = pairs - held.pairs;
  for (const Cells& column : columns) {
    const i64 taken = std::min(left, column.pairs);
    mass += column.mass * static_cast<double>(taken) / static_cast<double>(column.pairs);
    left -= taken;
  }
  return mass;
}

constexpr double kRounding = 2e-6;  // of a probability: fp32 logits and lse

}  // namespace

TEST_CASE("no set of as many pairs keeps more, and the best one is at most a column below") {
  const RandomLayer layer(1, 1, 8, 12, 5, 3);  // 5 queries of one tile at slots 7..11: columns of cost 1 to 5
  for (const auto& [sinks, window] :
       {std::pair(0, 0), std::pair(2, 0), std::pair(0, 3), std::pair(1, 4), std::pair(0, 9)}) {
    std::vector<RowSet> sets;
    for (unsigned bits = 0; bits < 1u << layer.length; ++bits) sets.push_back(columns(bits, sinks, window));
    std::vector<OracleRequest> requests;
    double best[61] = {};  // by pairs, over all subsets of columns
    std::vector<Cells> of;
    for (const RowSet& set : sets) {
      of.push_back(cells(layer, set, 0, 0, layer.queries));
      best[of.back().pairs] = std::max(best[of.back().pairs], of.back().mass);
      requests.push_back(oracle_request(layer.attention(), {set}, 8));
      REQUIRE(requests.back().pairs[0] == of.back().pairs);
    }
    std::partial_sum(std::begin(best), std::end(best), std::begin(best),
                     [](double a, double b) { return std::max(a, b); });
    const auto oracle = matched_oracle(layer.attention(), 8, layer.lse.data(), requests);
    double heaviest = 0;
    for (i64 j = 0; j < layer.length; ++j) heaviest = std::max(heaviest, cells(layer, columns(1u << j), 0, 0, 5).mass);
    for (std::size_t s = 0; s < sets.size(); ++s) {
      CHECK(oracle[s][0] >= best[of[s].pairs] - kRounding);
      if (window == 0 && sinks == 0) CHECK(oracle[s][0] <= best[of[s].pairs] + heaviest + kRounding);
    }
  }
}

TEST_CASE("exact at the capacities of the sorted columns, fractional between them") {
  const RandomLayer layer(1, 1, 16, 40, 1, 5);  // one query: every column costs one pair
  std::vector<double> p(layer.p);
  std::sort(p.begin(), p.end(), std::greater<>());
  std::vector<OracleRequest> requests;
  for (i64 n = 0; n <= 40; ++n) requests.push_back({{n}, {}, {}});
  const auto oracle = matched_oracle(layer.attention(), 1, layer.lse.data(), requests);
  double sum = 0;
  for (std::size_t n = 0; n <= 40; ++n) {
    CHECK(oracle[n][0] == doctest::Approx(sum).epsilon(kRounding));
    if (n < 40) sum += p[n];
  }
}

TEST_CASE("one pair buys a part of the densest column") {
  const RandomLayer layer(1, 1, 16, 40, 8, 6);
  double density = 0;
  for (i32 j = 0; j < 40; ++j) {
    RowSet column;
    column.slots = {j};
    const Cells read = cells(layer, column, 0, 0, 8);
    density = std::max(density, read.mass / static_cast<double>(read.pairs));
  }
  const auto oracle = matched_oracle(layer.attention(), 8, layer.lse.data(), {{{1}, {}, {}}});
  CHECK(oracle[0][0] == doctest::Approx(density).epsilon(1e-5));
}

TEST_CASE("a whole row keeps everything; an exact window answers with its own cells") {
  const RandomLayer layer(4, 2, 24, 100, 100, 7);
  RowSet all;
  all.slots.resize(100);
  std::iota(all.slots.begin(), all.slots.end(), 0);
  RowSet window;
  window.exact_sinks = 3;
  window.exact_window = 17;
  const i32 q_tile = 32;
  const std::vector<RowSet> full(4 * 4, all), local(4 * 4, window);
  const Attention a = layer.attention();
  const auto oracle =
      matched_oracle(a, q_tile, layer.lse.data(), {oracle_request(a, full, q_tile), oracle_request(a, local, q_tile)});
  for (i64 row = 0; row < 16; ++row) {
    const i64 begin = row % 4 * q_tile, end = std::min<i64>(begin + q_tile, 100);
    CHECK(oracle[0][static_cast<std::size_t>(row)] ==
          doctest::Approx(static_cast<double>(end - begin)).epsilon(kRounding));
    CHECK(oracle[1][static_cast<std::size_t>(row)] >= cells(layer, window, row / 4, begin, end).mass - 64 * kRounding);
  }
}

TEST_CASE("regret of random sets is never negative, and the request counts what the set reads") {
  std::mt19937 random(11);
  for (const bool exact : {false, true}) {
    for (unsigned seed = 0; seed < 4; ++seed) {
      const RandomLayer layer(6, 2, 20, 150, seed % 2 ? 150 : 70, seed);
      const i32 q_tile = seed < 2 ? 32 : 64;
      const i64 tiles = (layer.queries + q_tile - 1) / q_tile;
      const Attention a = layer.attention();
      std::vector<OracleRequest> requests;
      std::vector<std::vector<double>> kept;
      for (int method = 0; method < 6; ++method) {
        std::vector<RowSet> sets;
        kept.emplace_back(static_cast<std::size_t>(layer.heads * layer.queries));
        for (i64 row = 0; row < layer.heads * tiles; ++row) {
          sets.push_back(random_set(random, layer.length, exact));
          const i64 head = row / tiles, begin = row % tiles * q_tile;
          for (i64 i = begin; i < std::min(begin + q_tile, layer.queries); ++i) {
            kept.back()[static_cast<std::size_t>(head * layer.queries + i)] =
                cells(layer, sets.back(), head, i, i + 1).mass;
          }
        }
        requests.push_back(oracle_request(a, sets, q_tile));
      }
      const auto oracle = matched_oracle(a, q_tile, layer.lse.data(), requests);
      std::vector<double> regret(kept[0].size());
      double mean = 0;
      for (std::size_t m = 0; m < requests.size(); ++m) {
        regret_of_rows(oracle[m], kept[m].data(), layer.heads, layer.queries, q_tile, regret.data());
        CHECK(*std::min_element(regret.begin(), regret.end()) >= -kRounding);
        mean +=
            std::accumulate(regret.begin(), regret.end(), 0.0) / static_cast<double>(regret.size() * requests.size());
        const double row_regret = std::accumulate(regret.begin(), regret.begin() + q_tile, 0.0);
        const double row_kept = std::accumulate(kept[m].begin(), kept[m].begin() + q_tile, 0.0);
        CHECK(row_regret + row_kept == doctest::Approx(oracle[m][0]));
      }
      CHECK(mean > 0.05);
    }
  }
}

TEST_CASE("the bound is the one that is defined, for columns alone and beside exact cells") {
  std::mt19937 random(19);
  const RandomLayer layer(4, 2, 16, 60, 44, 8, 1.5f);
  const i32 q_tile = 16, tiles = 3;
  std::vector<RowSet> sets;
  for (i32 row = 0; row < layer.heads * tiles; ++row) sets.push_back(random_set(random, layer.length, row % 4 > 0));
  const OracleRequest request = oracle_request(layer.attention(), sets, q_tile);
  const auto oracle = matched_oracle(layer.attention(), q_tile, layer.lse.data(), {request});
  int exact_is_better = 0;
  for (i64 row = 0; row < layer.heads * tiles; ++row) {
    const auto at = static_cast<std::size_t>(row);
    const i64 head = row / tiles, begin = row % tiles * q_tile, end = std::min<i64>(begin + q_tile, layer.queries);
    RowSet exact = sets[at];
    exact.slots.clear();
    const double columns = definition(layer, {}, request.pairs[at], head, begin, end);
    const double beside = definition(layer, exact, request.pairs[at], head, begin, end);
    exact_is_better += beside > columns;
    CHECK(oracle[0][at] == doctest::Approx(std::max(columns, beside)).epsilon(kRounding));
  }
  CHECK(exact_is_better > 0);
}

TEST_CASE("methods asked together, threads and instruction sets do not change an answer") {
  std::mt19937 random(13);
  const RandomLayer layer(2, 1, 32, 130, 130, 2);
  const Attention a = layer.attention();
  std::vector<OracleRequest> requests;
  for (int method = 0; method < 5; ++method) {
    std::vector<RowSet> sets;
    for (int row = 0; row < 2 * 3; ++row) sets.push_back(random_set(random, 130, method % 2 == 1));
    requests.push_back(oracle_request(a, sets, 64));
  }
  const auto together = matched_oracle(a, 64, layer.lse.data(), requests);
  for (std::size_t m = 0; m < requests.size(); ++m) {
    CHECK(matched_oracle(a, 64, layer.lse.data(), {requests[m]})[0] == together[m]);
  }
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  CHECK(matched_oracle(a, 64, layer.lse.data(), requests) == together);
  omp_set_num_threads(threads);
  const simd::Isa best = simd::isa();
  for (const simd::Isa isa : {simd::Isa::portable, simd::Isa::avx2, simd::Isa::avx512}) {
    simd::use_isa(isa);
    const auto other = matched_oracle(a, 64, layer.lse.data(), requests);
    for (std::size_t row = 0; row < 6; ++row) CHECK(other[0][row] == doctest::Approx(together[0][row]).epsilon(1e-6));
  }
  simd::use_isa(best);
}

TEST_CASE("eviction: the heaviest tokens of each KV head, and all later ones") {
  const RandomLayer layer(4, 2, 16, 60, 12, 17);  // cut at 45: three tokens between the cut and the first query
  const i64 cut = 45;
  const std::vector<std::vector<i64>> kept = {{0, 45}, {7, 20}, {45, 3}};
  const auto oracle = matched_evict_oracle(layer.attention(), cut, layer.lse.data(), kept);
  for (std::size_t m = 0; m < kept.size(); ++m) {
    for (i64 kv = 0; kv < 2; ++kv) {
      std::vector<double> column(static_cast<std::size_t>(cut));
      for (i64 h = 2 * kv; h < 2 * kv + 2; ++h)
        for (i64 i = 0; i < layer.queries; ++i)
          for (i64 j = 0; j < cut; ++j) column[static_cast<std::size_t>(j)] += layer.probability(h, i, j);
      std::vector<i64> order(column.size());
      std::iota(order.begin(), order.end(), i64{0});
      std::sort(order.begin(), order.end(), [&](i64 x, i64 y) {
        return column[static_cast<std::size_t>(x)] > column[static_cast<std::size_t>(y)];
      });
      for (i64 h = 2 * kv; h < 2 * kv + 2; ++h) {
        for (i64 i = 0; i < layer.queries; ++i) {
          double expected = 0;
          for (i64 n = 0; n < kept[m][static_cast<std::size_t>(kv)]; ++n) {
            expected += layer.probability(h, i, order[static_cast<std::size_t>(n)]);
          }
          for (i64 j = cut; j < layer.length; ++j) expected += layer.probability(h, i, j);
          CHECK(oracle[m][static_cast<std::size_t>(h * layer.queries + i)] ==
                doctest::Approx(expected).epsilon(kRounding));
        }
      }
    }
  }
}
