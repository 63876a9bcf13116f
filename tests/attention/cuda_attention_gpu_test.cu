// The GPU's attention against the fp64 oracle on awkward shapes, and what the kernels promise besides numbers.
#include <cuda_runtime.h>

#include "attention/device_attention.hpp"
#include "attention/random_selection.hpp"
#include "lacuna/base/error.hpp"

namespace {

using namespace lacuna;
using namespace lacuna::test;
using sdk::Dtype;

sdk::Layer layer_of(i32 heads, i32 kv_heads, i32 d, i64 window = 0) {
  return {0, 1, heads, kv_heads, d, 1.f / std::sqrt(static_cast<float>(d)), window};
}

/// Queries in a 16-bit type.
struct Rounded {
  Rounded(const std::vector<float>& from, Dtype dtype) : dtype(dtype) {
    for (const float x : from) data.push_back(dtype == Dtype::bf16 ? sdk::to_bf16(x) : sdk::to_f16(x));
  }
  sdk::Queries of(sdk::Queries q) const {
    q.data = data.data();
    q.dtype = dtype;
    return q;
  }
  std::vector<sdk::u16> data;
  Dtype dtype;
};

std::vector<std::vector<i32>> same_length(i32 rows, i64 n) {
  return std::vector<std::vector<i32>>(static_cast<std::size_t>(rows), consecutive(n));
}

}  // namespace

TEST_CASE("GPU attention, dense: head sizes, groups, lengths and dtypes") {
  struct Shape {
    i32 group, kv_heads, d;
    i64 count, length;
    Dtype dtype;
  };
  const Shape shapes[] = {
      {1, 2, 64, 1, 1, Dtype::bf16},     {3, 3, 64, 1, 2049, Dtype::bf16},  {7, 2, 64, 65, 65, Dtype::bf16},
      {8, 1, 128, 130, 257, Dtype::f16}, {7, 1, 128, 1, 3000, Dtype::bf16}, {8, 2, 128, 5, 700, Dtype::bf16},
      {4, 1, 256, 33, 300, Dtype::bf16}, {1, 2, 256, 1, 999, Dtype::f16},   {3, 1, 256, 40, 40, Dtype::f16},
      {1, 3, 64, 17, 131, Dtype::f16},   {1, 1, 128, 64, 64, Dtype::f16},   {3, 1, 80, 15, 600, Dtype::f32},
      {1, 3, 40, 100, 100, Dtype::f16},  {5, 1, 13, 17, 100, Dtype::bf16},  {2, 1, 64, 9, 333, Dtype::f32},
      {8, 1, 128, 1, 63, Dtype::f32},
  };
  for (const Shape& s : shapes)
    for (const Dtype of_queries : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      CAPTURE(s.d);
      CAPTURE(s.group);
      CAPTURE(s.count);
      CAPTURE(s.length);
      CAPTURE(static_cast<int>(s.dtype));
      CAPTURE(static_cast<int>(of_queries));
      PagedFixture cache(same_length(s.kv_heads, s.length), s.d, s.dtype);
      cache.fill(21, 4.f);
      const i32 heads = s.group * s.kv_heads;
      const auto q = random_floats(heads * s.count * s.d, 22);
      const Rounded rounded(q, of_queries);
      Attention a{layer_of(heads, s.kv_heads, s.d), cache.view(),
                  queries_of(q, 1, heads, s.d, s.count, s.length - s.count)};
      if (of_queries != Dtype::f32) a.q = rounded.of(a.q);
      DeviceAttention call(a);
      CHECK(worst_error(call.run(), oracle(a), s.d) <= 1.);
      CHECK(call.plan.tensor_cores == (s.dtype != Dtype::f32 && s.d % 64 == 0));
    }
}

TEST_CASE("GPU attention, dense: several sequences, ragged rows, page sizes, strided and unaligned queries") {
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
        CHECK(worst_error(a) <= 1.);
        const SelectionFixture selection = random_selection(2, 2, false, 16, count, 61, true, 9);
        a.read = &selection.selection;
        CHECK(worst_error(a) <= 1.);
        a.read = nullptr;
      }
    }
}

TEST_CASE("GPU attention: a sliding window counts original positions") {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f32}) {
    PagedFixture cache({evicted(220, 60, 400, 1), evicted(300, 60, 400, 2)}, 64, dtype);
    cache.fill(5);
    const auto q = random_floats(4 * 60 * 64, 6);
    for (const i64 window : {1, 10, 100, 1000}) {
      CAPTURE(window);
      CHECK(worst_error({layer_of(4, 2, 64, window), cache.view(), queries_of(q, 1, 4, 64, 60, 340)}) <= 1.);
    }
  }
}

TEST_CASE("GPU attention: selections of pieces, tokens, exact parts, weights, ragged heads, empty rows") {
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
          CHECK(worst_error(a) <= 1.);
        }
      }
}

TEST_CASE("GPU attention: a token listed twice is read once, with the weight of the first piece, else token") {
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
  CHECK(worst_error(a) <= 1.);
}

TEST_CASE("GPU attention: a selection of everything equals dense, and of nothing gives the identity") {
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
    CHECK(worst_error(DeviceAttention(a).run(), dense, 64) <= 1.);
  }
  const SelectionFixture selection(rows, 32, none);
  a.read = &selection.selection;
  const Result r = DeviceAttention(a).run();
  CHECK(std::all_of(r.out.begin(), r.out.end(), [](float x) { return x == 0; }));
  CHECK(std::all_of(r.lse.begin(), r.lse.end(), [](float x) { return x == -std::numeric_limits<float>::infinity(); }));
}

TEST_CASE("GPU attention: a range of tiles computes its own queries and leaves the others") {
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
  DeviceAttention call(a);
  const Result r = call.run();
  CHECK(call.plan.splits > 1);
  for (std::size_t i = 0; i < 200; ++i)
    if (i >= 64 && i < 192)
      CHECK(std::abs(r.lse[i] - dense.lse[i]) < 2e-3);
    else
      CHECK(r.lse[i] == kUnwritten);
}

TEST_CASE("GPU attention: lists that do not fit at once, and a cache longer than the planner's map") {
  PagedFixture cache({consecutive(500)}, 64, Dtype::bf16);
  cache.fill(45);
  const auto q = random_floats(300 * 64, 46);
  Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 300, 200)};
  const SelectionFixture selection = random_selection(1, 1, true, 1, 300, 500, true, 3);
  a.read = &selection.selection;
  a.kv.max_length = 1 << 18;  // an upper bound need not be a near one
  DeviceAttention chunked(a);
  CHECK(worst_error(chunked.run(), oracle(a), 64) <= 1.);
  CHECK(chunked.plan.list_rows < selection.selection.rows.count());

  constexpr i64 kLong = 300000;
  PagedFixture longer({consecutive(kLong)}, 64, Dtype::bf16);
  longer.fill(47);
  Attention b{layer_of(1, 1, 64), longer.view(), queries_of(q, 1, 1, 64, 1, kLong - 1)};
  SelectionFixture::Row row;
  row.pieces = {262100, 299990, 5, 131072};
  row.tokens = {262143, 262144, 262200, 17, 299000};
  row.sinks = 4;
  row.window = 40000;  // begins before the second map
  const SelectionFixture far(rows_of(1, 1, true, 1, 1, kLong - 1), 64, {row});
  b.read = &far.selection;
  CHECK(worst_error(b) <= 1.);
}

TEST_CASE("GPU attention: the same bits again, whatever the workspace held") {
  PagedFixture cache(same_length(2, 3000), 64, Dtype::bf16);
  cache.fill(51, 3.f);
  for (const i64 count : {1, 200, 700}) {
    const auto q = random_floats(6 * count * 64, 52);
    Attention a{layer_of(6, 2, 64), cache.view(), queries_of(q, 1, 6, 64, count, 3000 - count)};
    const SelectionFixture selection = random_selection(1, 6, true, 64, count, 3000, true, 1);
    for (const sdk::Selection* read : {static_cast<const sdk::Selection*>(nullptr), &selection.selection}) {
      a.read = read;
      DeviceAttention call(a);
      const Result one = call.run();
      for (const int garbage : {0, 0x3f, 0xff}) {
        const Result two = call.run(garbage);
        CHECK(one.out == two.out);
        CHECK(one.lse == two.lse);
      }
    }
  }
}

TEST_CASE("GPU attention: a decode step in a CUDA graph replays to equal bits, and reads its arrays anew") {
  PagedFixture cache(same_length(2, 2000), 128, Dtype::bf16);
  cache.fill(53);
  const auto q = random_floats(8 * 128, 54);
  Attention a{layer_of(8, 2, 128), cache.view(), queries_of(q, 1, 8, 128, 1, 1999)};
  SelectionFixture::Row row;
  for (i32 p = 0; p < 1900; p += 160) row.pieces.push_back(p);
  row.window = 64;
  const SelectionFixture selection(rows_of(1, 2, false, 1, 1, 1999), 32, {row, row});
  for (const sdk::Selection* read : {static_cast<const sdk::Selection*>(nullptr), &selection.selection}) {
    a.read = read;
    DeviceAttention call(a);
    const Result direct = call.run();
    CHECK(call.plan.splits > 1);
    const auto stream = static_cast<cudaStream_t>(call.device().stream());
    call.prepare();
    cudaGraph_t graph{};
    cudaGraphExec_t exec{};
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    call.enqueue();
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
    for (int n = 0; n < 2; ++n) {
      REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
      const Result replayed = call.results();
      CHECK(replayed.out == direct.out);
      CHECK(replayed.lse == direct.lse);
    }

    // Half of the tokens go: the same graph sees it.
    std::vector<i32> shorter{1000, 1000};
    call.device().copy_in(const_cast<i32*>(call.attention.kv.length), shorter.data(), sizeof(i32) * shorter.size());
    REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
    const Result changed = call.results();
    cache.length = shorter;
    CHECK(worst_error(changed, oracle(a), 128) <= 1.);
    cache.length = {2000, 2000};
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess);
    CHECK(cudaGraphDestroy(graph) == cudaSuccess);
  }
}

TEST_CASE("GPU attention: an injected fault breaks the bound: one page of the table points elsewhere") {
  PagedFixture cache({consecutive(640)}, 64, Dtype::bf16);
  cache.fill(61);
  const auto q = random_floats(64 * 64, 62);
  const Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 64, 576)};
  const Reference exact = oracle(a);
  CHECK(worst_error(DeviceAttention(a).run(), exact, 64) <= 1.);
  cache.table[20] = cache.table[21];
  CHECK(worst_error(DeviceAttention(a).run(), exact, 64) > 3.);
}

TEST_CASE("GPU attention: calls that do not fit are refused") {
  PagedFixture cache({consecutive(10)}, 64, Dtype::bf16);
  cache.fill(1);
  const auto q = random_floats(10 * 64, 2);
  const Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 10, 0)};
  Attention other = a;
  other.layer.head_dim = 128;
  CHECK_THROWS_AS(plan_cuda_attention(other), Error);
  const SelectionFixture selection(rows_of(1, 1, true, 16, 10, 0), 1, std::vector<SelectionFixture::Row>(1));
  other = a;
  other.read = &selection.selection;
  const std::size_t bytes = plan_cuda_attention(other).workspace_bytes;
  CHECK_THROWS_WITH_AS(attend_cuda(other, nullptr, nullptr, nullptr, bytes - 1, nullptr),
                       doctest::Contains("too small"), Error);
  other.layer.sliding_window = 4;
  CHECK_THROWS_AS(plan_cuda_attention(other), Error);
}
