#include "ops/ops_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

// Straight from the definition, with zeros beyond the ends.
double brute_force(const sdk::Call& call, const sdk::Queries& q, i64 head, i64 tile, i64 unit, i64 block, i64 stride) {
  const i64 kv_row = head / call.layer.group(), length = call.kv.length[kv_row], per_block = block / stride;
  const auto logit = [&](i64 i, i64 j) {
    double sum = 0;
    for (i64 r = 0; r < stride; ++r) {
      const i64 query = i * stride + stride - 1 - r, key = j * stride + r;
      if (query >= q.count || key >= length) continue;
      for (i64 c = 0; c < q.head_dim; ++c)
        sum += static_cast<double>(q.at(0, head, query, c)) * call.kv.key(kv_row, key, c);
    }
    return sum / (std::sqrt(static_cast<double>(q.head_dim)) * static_cast<double>(stride));
  };
  double total = 0;
  i64 real = 0;
  for (i64 i = tile * per_block; i < (tile + 1) * per_block && i * stride < q.count; ++i, ++real) {
    std::vector<double> logits;
    for (i64 j = 0; j <= i; ++j) logits.push_back(logit(i, j));
    const auto p = softmax_of(logits);
    for (i64 j = unit * per_block; j < std::min<i64>((unit + 1) * per_block, i + 1); ++j)
      total += p[static_cast<std::size_t>(j)];
  }
  return total / static_cast<double>(real);
}

}  // namespace

TEST_CASE("antidiagonal_mass equals its definition, also at a partial group and tile, and a row sums to 1") {
  for (const i64 tokens : {128, 203})
    for (const i32 stride : {4, 16}) {
      CAPTURE(tokens);
      CAPTURE(stride);
      PagedFixture cache({consecutive(tokens), consecutive(tokens)}, 20, sdk::Dtype::bf16);
      cache.fill(3, 6.f);
      const auto data = random_floats(4 * tokens * 20, 4, 6.f);
      const sdk::Queries q = queries_of(data, 1, 4, 20, tokens, 0);
      OpsFixture f({0, 1, 4, 2, 20, 1.f, 0}, cache.view());
      sdk::Rows rows = rows_of(1, 4, true, 32, tokens, 0);
      for (const bool last_tiles_only : {false, true}) {
        if (last_tiles_only) {
          rows.tile_begin = rows.tiles - 2;
          rows.tiles = 2;
        }
        const i32 units = static_cast<i32>((tokens + 31) / 32);
        std::vector<float> value(static_cast<std::size_t>(rows.count() * units), -1.f);
        sdk::Scores scores{rows, value.data(), units, units, 32, -1};
        REQUIRE(f.ops.antidiagonal_mass(q, stride, scores, &f.error) == 0);
        for (i64 row = 0; row < rows.count(); ++row) {
          double sum = 0;
          for (i64 u = 0; u <= rows.tile_of(row); ++u) {
            const float found = value[static_cast<std::size_t>(row * units + u)];
            REQUIRE(near(found, brute_force(f.call, q, rows.head_of(row), rows.tile_of(row), u, 32, stride)));
            sum += found;
          }
          CHECK(sum == doctest::Approx(1.).epsilon(1e-6));
          for (i64 u = rows.tile_of(row) + 1; u < units; ++u)
            CHECK(value[static_cast<std::size_t>(row * units + u)] == -1.f);
        }
      }
    }
}

TEST_CASE("antidiagonal_mass names what does not fit") {
  PagedFixture cache({consecutive(64)}, 16);
  cache.fill(1);
  OpsFixture f({0, 1, 1, 1, 16, 1.f, 0}, cache.view());
  const auto data = random_floats(64 * 16, 2);
  std::vector<float> value(4);
  sdk::Scores scores{rows_of(1, 1, true, 32, 64, 0), value.data(), 2, 2, 32, -1};
  CHECK(f.ops.antidiagonal_mass(queries_of(data, 1, 1, 16, 64, 0), 5, scores, &f.error) != 0);
  CHECK(std::string(f.error.text).find("stride") != std::string::npos);
}
