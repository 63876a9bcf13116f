// What attention must do on any device: TEST_CASE_TEMPLATE_INVOKE(attention_..., Side). A Side has
//   Result run(a)                    the call on that device; what it leaves alone holds kUnwritten
//   double excess(result, exact, d)  the largest error as a factor of the device's bound: at most 1 is within
//   kLse                             its bound on a log-sum-exp near 0
//   kCountsWork                      whether run() fills Result::work
#pragma once

#include <doctest/doctest.h>

#include "attention/bound.hpp"
#include "attention/random_selection.hpp"

namespace lacuna::test {

using sdk::Dtype;

inline sdk::Layer layer_of(i32 heads, i32 kv_heads, i32 d, i64 window = 0) {
  return {0, 1, heads, kv_heads, d, 1.f / std::sqrt(static_cast<float>(d)), window};
}

inline std::vector<std::vector<i32>> same_length(i32 rows, i64 n) {
  return std::vector<std::vector<i32>>(static_cast<std::size_t>(rows), consecutive(n));
}

/// Queries in a type of their own.
struct Rounded {
  Rounded(const std::vector<float>& from, Dtype dtype) : dtype(dtype) {
    for (const float x : from) data.push_back(dtype == Dtype::bf16 ? sdk::to_bf16(x) : sdk::to_f16(x));
  }
  sdk::Queries of(sdk::Queries q) const {
    if (dtype == Dtype::f32) return q;
    q.data = data.data();
    q.dtype = dtype;
    return q;
  }
  std::vector<sdk::u16> data;
  Dtype dtype;
};

/// The call is within the bound, and its work is what it read.
template <class Side>
void check_call(const Attention& a) {
  const Result r = Side::run(a);
  CHECK(Side::excess(r, oracle(a), a.layer.head_dim) <= 1.);
  if constexpr (Side::kCountsWork) {
    i64 pairs = 0;
    for (i64 seq = 0; seq < a.q.seqs; ++seq)
      for (i64 head = 0; head < a.q.heads; ++head)
        for (i64 i = 0; i < a.q.count; ++i) pairs += static_cast<i64>(cells_of(a, seq, head, i).size());
    CHECK(r.work.pairs == pairs);
    CHECK((r.work.dense_rows > 0) == !a.read);
    CHECK(r.work.sparse_rows == (a.read ? static_cast<i64>(a.q.seqs) * a.q.heads * a.read->rows.tiles : 0));
  }
}

struct DenseShape {
  i32 group, kv_heads, d;
  i64 count, length;
  Dtype dtype;
};
inline constexpr DenseShape kDenseShapes[] = {
    {1, 2, 64, 1, 1, Dtype::bf16},     {3, 3, 64, 1, 2049, Dtype::bf16},  {7, 2, 64, 65, 65, Dtype::bf16},
    {8, 1, 128, 130, 257, Dtype::f16}, {7, 1, 128, 1, 3000, Dtype::bf16}, {8, 2, 128, 5, 700, Dtype::bf16},
    {4, 1, 256, 33, 300, Dtype::bf16}, {1, 2, 256, 1, 999, Dtype::f16},   {3, 1, 256, 40, 40, Dtype::f16},
    {1, 3, 64, 17, 131, Dtype::f16},   {1, 1, 128, 64, 64, Dtype::f16},   {3, 1, 80, 15, 600, Dtype::f32},
    {1, 3, 40, 100, 100, Dtype::f16},  {5, 1, 13, 17, 100, Dtype::bf16},  {2, 1, 64, 9, 333, Dtype::f32},
    {8, 1, 128, 1, 63, Dtype::f32},    {1, 2, 64, 1, 1, Dtype::f32},
};

/// Head sizes, groups, lengths and types of cache and queries.
template <class Side>
void check_dense_shapes(float key_scale, const std::vector<Dtype>& types_of_queries) {
  for (const DenseShape& s : kDenseShapes)
    for (const Dtype of_queries : types_of_queries) {
      CAPTURE(s.d);
      CAPTURE(s.group);
      CAPTURE(s.count);
      CAPTURE(s.length);
      CAPTURE(static_cast<int>(s.dtype));
      CAPTURE(static_cast<int>(of_queries));
      PagedFixture cache(same_length(s.kv_heads, s.length), s.d, s.dtype);
      cache.fill(21, key_scale);
      const i32 heads = s.group * s.kv_heads;
      const auto q = random_floats(heads * s.count * s.d, 22);
      const Rounded rounded(q, of_queries);
      Attention a{layer_of(heads, s.kv_heads, s.d), cache.view(),
                  queries_of(q, 1, heads, s.d, s.count, s.length - s.count)};
      a.q = rounded.of(a.q);
      check_call<Side>(a);
    }
}

TEST_CASE_TEMPLATE_DEFINE("attention: sequences, ragged rows, page sizes, strided and unaligned queries", Side,
                          attention_layouts) {
  for (const i32 page_size : {1, 16, 24})
    for (const i64 count : {1, 30}) {
      CAPTURE(page_size);
      CAPTURE(count);
      PagedFixture cache(
          {evicted(90, 40, 200, 1), evicted(61, 40, 200, 2), evicted(77, 40, 200, 3), evicted(150, 40, 200, 4)}, 64,
          Dtype::bf16, page_size);
      cache.fill(11);
      const auto q = random_floats(2 * 6 * count * 72 + 1, 5);
      const Rounded rounded(q, Dtype::bf16);
      Attention a{layer_of(6, 2, 64), cache.view(), queries_of(q, 2, 6, 64, count, 200 - count)};
      a.q = rounded.of(a.q);
      for (const i64 pad : {8, 3}) {  // rows of 16-byte blocks, and not
        a.q.row_stride = 64 + pad;
        a.q.head_stride = count * a.q.row_stride;
        a.q.seq_stride = 6 * a.q.head_stride;
        a.q.data = rounded.data.data() + (pad == 3 ? 1 : 0);
        check_call<Side>(a);
        const SelectionFixture selection = random_selection(2, 2, false, 16, count, 61, true, 9);
        a.read = &selection.selection;
        check_call<Side>(a);
        a.read = nullptr;
      }
    }
}

TEST_CASE_TEMPLATE_DEFINE("attention: a sliding window counts original positions", Side, attention_window) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f32}) {
    PagedFixture cache({evicted(220, 60, 400, 1), evicted(300, 60, 400, 2)}, 64, dtype);
    cache.fill(5);
    const auto q = random_floats(4 * 60 * 64, 6);
    for (const i64 window : {1, 10, 100, 1000}) {
      CAPTURE(window);
      check_call<Side>({layer_of(4, 2, 64, window), cache.view(), queries_of(q, 1, 4, 64, 60, 340)});
    }
  }
}

TEST_CASE_TEMPLATE_DEFINE("attention: unaligned overlapping pieces, tokens, exact parts, weights, empty rows", Side,
                          attention_selections) {
  struct Shape {
    i32 d, q_tile;
    i64 count;
    Dtype dtype;
  };
  const Shape shapes[] = {{64, 33, 150, Dtype::bf16}, {128, 64, 100, Dtype::f16}, {256, 200, 150, Dtype::bf16},
                          {64, 1, 1, Dtype::bf16},    {40, 33, 100, Dtype::bf16}, {64, 16, 100, Dtype::f32}};
  for (const Shape& s : shapes)
    for (const bool per_query_head : {false, true})
      for (const bool weighted : {false, true}) {
        CAPTURE(s.d);
        CAPTURE(s.q_tile);
        CAPTURE(per_query_head);
        CAPTURE(weighted);
        PagedFixture cache({evicted(290, s.count, 500, 1), evicted(310, s.count, 500, 2)}, s.d, s.dtype);
        cache.fill(31);
        const auto q = random_floats(6 * s.count * s.d, 32);
        Attention a{layer_of(6, 2, s.d), cache.view(), queries_of(q, 1, 6, s.d, s.count, 500 - s.count)};
        for (unsigned seed = 0; seed < 4; ++seed) {
          const SelectionFixture selection =
              random_selection(1, per_query_head ? 6 : 2, per_query_head, s.q_tile, s.count, 290, weighted, seed + 10);
          a.read = &selection.selection;
          a.ignore_weights = seed == 2;
          check_call<Side>(a);
        }
      }
}

TEST_CASE_TEMPLATE_DEFINE(
    "attention: a token listed twice is read once, with the weight of the first piece, else token", Side,
    attention_listed_twice) {
  PagedFixture cache({consecutive(100)}, 64, Dtype::bf16);
  cache.fill(33);
  const auto q = random_floats(64, 34);
  SelectionFixture::Row row;
  row.pieces = {40, 30, 30, -10, 90};
  row.piece_weight = {1.f, -1.f, 2.f, 3.f, 0.5f};
  row.tokens = {45, 20, 7, 20, 99, 31, 3};
  row.token_weight = {5.f, 0.25f, -3.f, 4.f, 4.f, 4.f, 1.f};
  row.sinks = 5;
  row.window = 3;
  const SelectionFixture selection(rows_of(1, 1, true, 1, 1, 99), 20, {row}, true);
  Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 1, 99)};
  a.read = &selection.selection;
  check_call<Side>(a);
}

TEST_CASE_TEMPLATE_DEFINE("attention: a selection of everything equals dense, and of nothing gives the identity", Side,
                          attention_everything) {
  PagedFixture cache(same_length(2, 333), 64, Dtype::bf16);
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
    CHECK(Side::excess(Side::run(a), dense, 64) <= 1.);
    check_call<Side>(a);
  }
  const SelectionFixture selection(rows, 32, none);
  a.read = &selection.selection;
  const Result r = Side::run(a);
  CHECK(r.work.pairs == 0);
  CHECK(std::all_of(r.out.begin(), r.out.end(), [](float x) { return x == 0; }));
  CHECK(std::all_of(r.lse.begin(), r.lse.end(), [](float x) { return x == -std::numeric_limits<float>::infinity(); }));
}

TEST_CASE_TEMPLATE_DEFINE("attention: a range of tiles computes its own queries and leaves the others", Side,
                          attention_range_of_tiles) {
  PagedFixture cache({consecutive(900)}, 64, Dtype::bf16);
  cache.fill(43);
  const auto q = random_floats(200 * 64, 44);
  Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 200, 700)};
  const Reference dense = oracle(a);
  sdk::Rows rows = rows_of(1, 1, true, 64, 200, 700);
  rows.tile_begin = 1;
  rows.tiles = 2;
  std::vector<SelectionFixture::Row> full(2);
  for (auto& row : full) row.full = 1;
  const SelectionFixture selection(rows, 1, full);
  a.read = &selection.selection;
  const Result r = Side::run(a);
  for (std::size_t i = 0; i < 200; ++i)
    if (i >= 64 && i < 192)
      CHECK(std::abs(r.lse[i] - dense.lse[i]) < Side::kLse);
    else
      CHECK(r.lse[i] == kUnwritten);
}

TEST_CASE_TEMPLATE_DEFINE("attention: an injected fault breaks the bound: one page of the table points elsewhere", Side,
                          attention_fault) {
  PagedFixture cache({consecutive(640)}, 64, Dtype::bf16);
  cache.fill(61);
  const auto q = random_floats(64 * 64, 62);
  const Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 64, 576)};
  const Reference exact = oracle(a);
  CHECK(Side::excess(Side::run(a), exact, 64) <= 1.);
  cache.table[20] = cache.table[21];
  CHECK(Side::excess(Side::run(a), exact, 64) > 3.);
}

}  // namespace lacuna::test
