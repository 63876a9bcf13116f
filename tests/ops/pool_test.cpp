#include "ops/ops_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

TEST_CASE("pool: max pads with -inf, mean counts the zero padding, rows have their own length") {
  PagedFixture cache({consecutive(1)}, 8);
  OpsFixture f({0, 1, 1, 1, 8, 1.f, 0}, cache.view());
  const auto in = random_floats(3 * 50, 1);
  const i32 count[] = {50, 7, 0};
  for (const i32 kernel : {1, 5, 8, 101})
    for (const auto reduce : {sdk::Reduce::sum, sdk::Reduce::mean, sdk::Reduce::max}) {
      std::vector<float> out(150, 9.f);
      REQUIRE(f.ops.pool(in.data(), out.data(), 3, count, 50, kernel, reduce, &f.error) == 0);
      for (i64 r = 0; r < 3; ++r)
        for (i64 i = 0; i < 50; ++i) {
          const float found = out[static_cast<std::size_t>(r * 50 + i)];
          if (i >= count[r]) {
            CHECK(found == 9.f);
            continue;
          }
          double most = -1e30, sum = 0;
          for (i64 j = i - kernel / 2; j < i - kernel / 2 + kernel; ++j)
            if (j >= 0 && j < count[r]) {
              most = std::max<double>(most, in[static_cast<std::size_t>(r * 50 + j)]);
              sum += in[static_cast<std::size_t>(r * 50 + j)];
            }
          CHECK(found == doctest::Approx(reduce == sdk::Reduce::max    ? most
                                         : reduce == sdk::Reduce::mean ? sum / kernel
                                                                       : sum)
                             .epsilon(1e-6));
        }
    }
  CHECK(f.ops.pool(in.data(), nullptr, 3, count, 50, 0, sdk::Reduce::max, &f.error) != 0);
}

TEST_CASE("group_reduce reduces the query heads of each KV head") {
  PagedFixture cache({consecutive(1), consecutive(1), consecutive(1), consecutive(1)}, 8);
  OpsFixture f({0, 1, 6, 2, 8, 1.f, 0}, cache.view());
  const auto in = random_floats(12 * 20, 2);
  for (const auto reduce : {sdk::Reduce::sum, sdk::Reduce::mean, sdk::Reduce::max}) {
    std::vector<float> out(4 * 20, 9.f);
    REQUIRE(f.ops.group_reduce(in.data(), out.data(), 17, 20, reduce, &f.error) == 0);
    for (std::size_t row = 0; row < 4; ++row)
      for (std::size_t i = 0; i < 20; ++i) {
        const float a = in[row * 60 + i], b = in[row * 60 + 20 + i], c = in[row * 60 + 40 + i];
        const double sum = static_cast<double>(a) + b + c;
        const double expected = i >= 17                       ? 9.
                                : reduce == sdk::Reduce::max  ? std::max({a, b, c})
                                : reduce == sdk::Reduce::mean ? sum / 3
                                                              : sum;
        CHECK(out[row * 20 + i] == doctest::Approx(expected).epsilon(1e-6));
      }
  }
}

TEST_CASE("mean_keys and mean_queries, partial blocks by their own count or by the full one") {
  PagedFixture cache({some_positions(40, 90, 1), some_positions(21, 90, 2)}, 12, sdk::Dtype::f16);
  cache.fill(3);
  OpsFixture f({0, 1, 4, 2, 12, 1.f, 0}, cache.view());
  const auto data = random_floats(4 * 30 * 12, 4);
  const sdk::Queries q = queries_of(data, 1, 4, 12, 30, 60);
  for (const i32 full : {0, 1}) {
    std::vector<float> keys(2 * 3 * 12, 9.f), queries(4 * 4 * 12, 9.f);
    REQUIRE(f.ops.mean_keys(16, full, keys.data(), &f.error) == 0);
    REQUIRE(f.ops.mean_queries(q, 8, full, queries.data(), &f.error) == 0);
    for (i64 row = 0; row < 2; ++row)
      for (i64 b = 0; b < 3; ++b)
        for (i64 c = 0; c < 12; ++c) {
          double sum = 0, n = 0;
          for (i64 s = b * 16; s < std::min<i64>(b * 16 + 16, f.call.kv.length[row]); ++s, ++n)
            sum += f.call.kv.key(row, s, c);
          CHECK(keys[static_cast<std::size_t>((row * 3 + b) * 12 + c)] ==
                doctest::Approx(n == 0 ? 0 : sum / (full ? 16 : n)).epsilon(1e-6));
        }
    for (i64 head = 0; head < 4; ++head)
      for (i64 t = 0; t < 4; ++t)
        for (i64 c = 0; c < 12; ++c) {
          double sum = 0, n = 0;
          for (i64 i = t * 8; i < std::min<i64>(t * 8 + 8, 30); ++i, ++n) sum += q.at(0, head, i, c);
          CHECK(queries[static_cast<std::size_t>((head * 4 + t) * 12 + c)] ==
                doctest::Approx(sum / (full ? 8 : n)).epsilon(1e-6));
        }
  }
}
