// The GPU's attention against the fp64 oracle on awkward shapes, and what the kernels promise besides numbers.
#include <cuda_runtime.h>

#include "attention/cases.hpp"
#include "attention/device_attention.hpp"
#include "lacuna/base/error.hpp"

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE_TEMPLATE_INVOKE(attention_layouts, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_window, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_selections, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_listed_twice, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_everything, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_range_of_tiles, GpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_fault, GpuSide);

TEST_CASE("GPU attention, dense: head sizes, groups, lengths and dtypes") {
  check_dense_shapes<GpuSide>(4.f, {Dtype::f32, Dtype::bf16, Dtype::f16});
}

TEST_CASE("GPU attention: 16-bit caches of whole tiles go to the tensor cores, long ranges of few tiles are split") {
  for (const DenseShape& s : kDenseShapes) {
    CAPTURE(s.d);
    PagedFixture cache(same_length(s.kv_heads, s.length), s.d, s.dtype);
    cache.fill(21);
    const i32 heads = s.group * s.kv_heads;
    const auto q = random_floats(heads * s.count * s.d, 22);
    const Attention a{layer_of(heads, s.kv_heads, s.d), cache.view(),
                      queries_of(q, 1, heads, s.d, s.count, s.length - s.count)};
    DeviceAttention call(a);
    call.prepare();
    CHECK(call.plan.tensor_cores == (s.dtype != Dtype::f32 && s.d % 64 == 0));
  }
  PagedFixture cache({consecutive(900)}, 64, Dtype::bf16);
  cache.fill(43);
  const auto q = random_floats(200 * 64, 44);
  Attention a{layer_of(1, 1, 64), cache.view(), queries_of(q, 1, 1, 64, 200, 700)};
  sdk::Rows rows = rows_of(1, 1, true, 64, 200, 700);
  rows.tile_begin = 1;
  rows.tiles = 2;
  const SelectionFixture selection(rows, 1, std::vector<SelectionFixture::Row>(2));
  a.read = &selection.selection;
  DeviceAttention call(a);
  call.prepare();
  CHECK(call.plan.splits > 1);
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
  check_call<GpuSide>(b);
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
