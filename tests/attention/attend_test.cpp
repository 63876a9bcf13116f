#include <omp.h>

#include <random>

#include "attention/bound.hpp"
#include "attention/random_selection.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/ops/simd.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::test;

sdk::Layer layer_of(i32 heads, i32 kv_heads, i32 d, i64 window = 0) {
  return {0, 1, heads, kv_heads, d, 1.f / std::sqrt(static_cast<float>(d)), window};
}

}  // namespace

TEST_CASE("the fp64 oracle equals brute force") {
  for (const bool sparse : {false, true}) {
    PagedFixture cache(
        {evicted(90, 40, 200, 1), evicted(61, 40, 200, 2), evicted(77, 40, 200, 3), evicted(150, 40, 200, 4)}, 24,
        sdk::Dtype::f16);
    cache.fill(11);
    const auto q = random_floats(2 * 6 * 40 * 24, 5);
    Attention a{layer_of(6, 2, 24), cache.view(), queries_of(q, 2, 6, 24, 40, 160)};
    const SelectionFixture selection = random_selection(2, 6, true, 16, 40, 61, true, 9);
    if (sparse) a.read = &selection.selection;
    const Reference r = oracle(a);
    for (i64 seq = 0; seq < 2; ++seq)
      for (i64 head = 0; head < 6; ++head)
        for (i64 i = 0; i < 40; ++i) {
          const Reference b = brute_force(a, seq, head, i);
          const auto at = static_cast<std::size_t>((seq * 6 + head) * 40 + i);
          CHECK((r.lse[at] == b.lse[0] || std::abs(r.lse[at] - b.lse[0]) < 1e-12));
          CHECK(std::abs(r.pv_norm[at] - b.pv_norm[0]) < 1e-12);
          for (std::size_t c = 0; c < 24; ++c) REQUIRE(std::abs(r.out[at * 24 + c] - b.out[c]) < 1e-12);
        }
  }
}

TEST_CASE("dense attention meets the bound on every instruction set, head size, group and length") {
  struct Shape {
    i32 group, kv_heads, d;
    i64 count, length;
    sdk::Dtype dtype;
  };
  const Shape shapes[] = {{1, 2, 64, 1, 1, sdk::Dtype::f32},      {3, 3, 64, 1, 2049, sdk::Dtype::bf16},
                          {7, 2, 64, 65, 65, sdk::Dtype::bf16},   {8, 1, 128, 130, 257, sdk::Dtype::f16},
                          {4, 1, 256, 33, 300, sdk::Dtype::bf16}, {3, 1, 80, 15, 1500, sdk::Dtype::f32},
                          {1, 3, 40, 200, 200, sdk::Dtype::f16},  {5, 1, 13, 17, 100, sdk::Dtype::bf16}};
  for (const auto isa : {simd::Isa::portable, simd::Isa::avx2, simd::Isa::avx512}) {
    simd::use_isa(isa);
    for (const Shape& s : shapes)
      for (const float scale : {1.f, 30.f}) {
        CAPTURE(static_cast<int>(isa));
        CAPTURE(s.d);
        CAPTURE(s.group);
        PagedFixture cache(std::vector<std::vector<i32>>(static_cast<std::size_t>(s.kv_heads), consecutive(s.length)),
                           s.d, s.dtype);
        cache.fill(21, scale);
        const i32 heads = s.group * s.kv_heads;
        const auto q = random_floats(heads * s.count * s.d, 22);
        const Attention a{layer_of(heads, s.kv_heads, s.d), cache.view(),
                          queries_of(q, 1, heads, s.d, s.count, s.length - s.count)};
        const Result r = run(a);
        CHECK(worst_excess(r, oracle(a), s.d) <= 1.);
        CHECK(r.work.dense_rows > 0);
        CHECK(r.work.sparse_rows == 0);
        CHECK(r.work.pairs == heads * (s.count * (s.length - s.count) + s.count * (s.count + 1) / 2));
      }
  }
  simd::use_isa(simd::Isa::avx512);
}

TEST_CASE("adversarial logits: huge, equal, with one that outweighs the rest") {
  PagedFixture cache({consecutive(300)}, 64);
  std::vector<float> q(64, 1.f), ones(64, 1.f);
  const Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 1, 299)};
  std::mt19937 rng(3);
  for (const int kind : {0, 1, 2, 3}) {
    CAPTURE(kind);
    for (i64 s = 0; s < 300; ++s) {
      std::vector<float> key(64, 0.f), value = random_floats(64, static_cast<unsigned>(s));
      if (kind == 0)
        key[0] = (rng() % 2 ? 8e4f : -8e4f) + static_cast<float>(s % 7);  // logits +-1e4, near ties at the top
      if (kind == 1) key = ones;                                          // all equal
      if (kind == 2) key[0] = s == 150 ? 8e4f : 0.f;
      if (kind == 3) {  // large terms that cancel
        key[0] = 3e4f;
        key[1] = -3e4f + static_cast<float>(s % 11);
      }
      cache.set(0, s, key.data(), value.data());
    }
    CHECK(worst_excess_of_query(a, run(a), 0, 0, 0) <= 1.);
  }
}

TEST_CASE("a sliding window counts original positions") {
  PagedFixture cache({evicted(120, 60, 400, 1), evicted(200, 60, 400, 2)}, 64);
  cache.fill(5);
  const auto q = random_floats(4 * 60 * 64, 6);
  for (const i64 window : {1, 10, 100, 1000}) {
    const Attention a{layer_of(4, 2, 64, window), cache.view(), queries_of(q, 1, 4, 64, 60, 340)};
    const Result r = run(a);
    CHECK(worst_excess(r, oracle(a), 64) <= 1.);
    i64 pairs = 0;
    for (i64 head = 0; head < 4; ++head)
      for (i64 i = 0; i < 60; ++i) {
        CHECK(worst_excess_of_query(a, r, 0, head, i) <= 1.);
        pairs += static_cast<i64>(cells_of(a, 0, head, i).size());
      }
    CHECK(r.work.pairs == pairs);
  }
}

TEST_CASE("selections: unaligned overlapping pieces, tokens, exact parts, weights, ragged heads, empty rows") {
  for (const bool per_query_head : {false, true})
    for (const i64 count : {1, 100, 150})
      for (const bool weighted : {false, true}) {
        CAPTURE(per_query_head);
        CAPTURE(count);
        CAPTURE(weighted);
        PagedFixture cache({evicted(290, count, 500, 1), evicted(310, count, 500, 2)}, 40, sdk::Dtype::bf16);
        cache.fill(31);
        const auto q = random_floats(6 * count * 40, 32);
        Attention a{layer_of(6, 2, 40), cache.view(), queries_of(q, 1, 6, 40, count, 500 - count)};
        for (unsigned seed = 0; seed < 3; ++seed) {
          const SelectionFixture selection =
              random_selection(1, per_query_head ? 6 : 2, per_query_head, 33, count, 290, weighted, seed);
          a.read = &selection.selection;
          a.ignore_weights = seed == 2;
          const Result r = run(a);
          CHECK(r.work.dense_rows == 0);
          CHECK(r.work.sparse_rows == 6 * selection.selection.rows.tiles);
          i64 pairs = 0;
          for (i64 head = 0; head < 6; ++head)
            for (i64 i = 0; i < count; ++i) {
              REQUIRE(worst_excess_of_query(a, r, 0, head, i) <= 1.);
              pairs += static_cast<i64>(cells_of(a, 0, head, i).size());
            }
          CHECK(r.work.pairs == pairs);
        }
      }
}

TEST_CASE("a selection of everything equals dense through the sparse path, and of nothing gives the identity") {
  PagedFixture cache({consecutive(333), consecutive(333)}, 64);
  cache.fill(41);
  const auto q = random_floats(4 * 333 * 64, 42);
  Attention a{layer_of(4, 2, 64), cache.view(), queries_of(q, 1, 4, 64, 333, 0)};
  const Reference dense = oracle(a);
  const sdk::Rows rows = rows_of(1, 2, false, 64, 333, 0);
  std::vector<SelectionFixture::Row> all(static_cast<std::size_t>(rows.count())), full(all.size()), none(all.size());
  for (auto& row : all)
    for (i32 p = 0; p < 333; p += 32) row.pieces.push_back(p);
  for (auto& row : full) row.full = 1;
  for (const auto& content : {all, full}) {
    const SelectionFixture selection(rows, 32, content);
    a.read = &selection.selection;
    const Result r = run(a);
    CHECK(worst_excess(r, dense, 64) <= 1.);
    CHECK(r.work.sparse_rows == 4 * rows.tiles);
    CHECK(r.work.dense_rows == 0);
    CHECK(r.work.pairs == 4 * 333 * 334 / 2);
  }
  const SelectionFixture selection(rows, 32, none);
  a.read = &selection.selection;
  const Result r = run(a);
  CHECK(r.work.pairs == 0);
  CHECK(std::all_of(r.out.begin(), r.out.end(), [](float x) { return x == 0; }));
  CHECK(std::all_of(r.lse.begin(), r.lse.end(), [](float x) { return x == -std::numeric_limits<float>::infinity(); }));
}

TEST_CASE("a range of tiles computes its own queries and leaves the others") {
  PagedFixture cache({consecutive(200)}, 16);
  cache.fill(43);
  const auto q = random_floats(200 * 16, 44);
  Attention a{layer_of(1, 1, 16), cache.view(), queries_of(q, 1, 1, 16, 200, 0)};
  const Result dense = run(a);
  sdk::Rows rows = rows_of(1, 1, true, 64, 200, 0);
  rows.tile_begin = 1;
  rows.tiles = 2;
  std::vector<SelectionFixture::Row> full(2);
  for (auto& row : full) row.full = 1;
  const SelectionFixture selection(rows, 1, full);
  a.read = &selection.selection;
  const Result r = run(a);
  for (std::size_t i = 0; i < 200; ++i)
    if (i >= 64 && i < 192)
      CHECK(r.lse[i] == doctest::Approx(dense.lse[i]).epsilon(1e-6));
    else
      CHECK(r.lse[i] == 77.f);
}

TEST_CASE("the same bits on one thread and on two") {
  PagedFixture cache({consecutive(3000), consecutive(3000)}, 64, sdk::Dtype::bf16);
  cache.fill(51, 3.f);
  const int threads = omp_get_max_threads();
  for (const i64 count : {1, 700}) {
    const auto q = random_floats(6 * count * 64, 52);
    Attention a{layer_of(6, 2, 64), cache.view(), queries_of(q, 1, 6, 64, count, 3000 - count)};
    const SelectionFixture selection = random_selection(1, 6, true, 64, count, 3000, true, 1);
    for (const sdk::Selection* read : {static_cast<const sdk::Selection*>(nullptr), &selection.selection}) {
      a.read = read;
      omp_set_num_threads(1);
      const Result one = run(a);
      omp_set_num_threads(2);
      const Result two = run(a);
      CHECK(one.out == two.out);
      CHECK(one.lse == two.lse);
    }
  }
  omp_set_num_threads(threads);
}

TEST_CASE("an injected fault breaks the bound: one page of the table points elsewhere") {
  PagedFixture cache({consecutive(640)}, 64);
  cache.fill(61);
  const auto q = random_floats(64 * 64, 62);
  const Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 64, 576)};
  const Reference r = oracle(a);
  CHECK(worst_excess(run(a), r, 64) <= 1.);
  cache.table[20] = cache.table[21];
  CHECK(worst_excess(run(a), r, 64) > 10.);
}

TEST_CASE("shapes that do not fit are refused") {
  PagedFixture cache({consecutive(10)}, 16);
  cache.fill(1);
  const auto q = random_floats(2 * 20 * 16, 2);
  const sdk::Paged kv = cache.view();
  std::vector<float> out(2 * 20 * 16), lse(40);
  CHECK_THROWS_AS(attend({layer_of(1, 1, 16), kv, queries_of(q, 1, 1, 16, 20, 0)}, out.data(), lse.data()), Error);
  CHECK_THROWS_AS(attend({layer_of(2, 1, 16), kv, queries_of(q, 1, 1, 16, 10, 0)}, out.data(), lse.data()), Error);
  CHECK_THROWS_AS(attend({layer_of(1, 1, 8), kv, queries_of(q, 1, 1, 16, 10, 0)}, out.data(), lse.data()), Error);
  const SelectionFixture selection(rows_of(1, 1, true, 16, 10, 0), 1, std::vector<SelectionFixture::Row>(1));
  Attention windowed{layer_of(1, 1, 16, 4), kv, queries_of(q, 1, 1, 16, 10, 0)};
  windowed.read = &selection.selection;
  CHECK_THROWS_AS(attend(windowed, out.data(), lse.data()), Error);
}
