#include <omp.h>

#include <random>

#include "attention/cases.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/ops/simd.hpp"

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE_TEMPLATE_INVOKE(attention_layouts, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_window, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_selections, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_listed_twice, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_everything, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_range_of_tiles, CpuSide);
TEST_CASE_TEMPLATE_INVOKE(attention_fault, CpuSide);

TEST_CASE("the fp64 oracle equals brute force") {
  struct Reading {
    i64 window;
    bool sparse, ignore_weights;
    unsigned seed;
  };
  for (const Reading& reading : {Reading{0, false, false, 0},
                                 {30, false, false, 0},
                                 {0, true, false, 9},
                                 {0, true, false, 10},
                                 {0, true, true, 11}}) {
    PagedFixture cache(
        {evicted(90, 40, 200, 1), evicted(61, 40, 200, 2), evicted(77, 40, 200, 3), evicted(150, 40, 200, 4)}, 24,
        sdk::Dtype::f16);
    cache.fill(11);
    const auto q = random_floats(2 * 6 * 40 * 24, 5);
    Attention a{layer_of(6, 2, 24, reading.window), cache.view(), queries_of(q, 2, 6, 24, 40, 160)};
    const SelectionFixture selection = random_selection(2, 6, true, 16, 40, 61, true, reading.seed);
    if (reading.sparse) a.read = &selection.selection;
    a.ignore_weights = reading.ignore_weights;
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
  for (const auto isa : {simd::Isa::portable, simd::Isa::avx2, simd::Isa::avx512}) {
    CAPTURE(static_cast<int>(isa));
    simd::use_isa(isa);
    for (const float scale : {1.f, 30.f}) check_dense_shapes<CpuSide>(scale, {Dtype::f32});
  }
  simd::use_isa(simd::Isa::avx512);
  check_dense_shapes<CpuSide>(4.f, {Dtype::bf16, Dtype::f16});
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
