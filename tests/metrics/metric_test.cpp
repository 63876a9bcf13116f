#include "lacuna/metrics/metric.hpp"

#include <doctest/doctest.h>

#include <set>

#include "lacuna/base/error.hpp"
#include "random_layer.hpp"

using namespace lacuna;
using lacuna::test::RandomLayer;
using sdk::i32;
using sdk::i64;

namespace {

constexpr i32 kHeads = 4, kDim = 12, kModel = 37;
constexpr i64 kQueries = 50;

/// A sparse read of random sets of a random layer in fp64, some queries reading nothing, and a W_O.
struct Case {
  RandomLayer layer{kHeads, 2, kDim, 80, kQueries, 21};
  std::vector<RowSet> sets;  // per (head, query)
  std::vector<float> dense_out, sparse_out, unweighted_out, sparse_lse, wo;
  std::vector<double> mass, dropped;  // [heads, queries], [heads, queries, dim]: sum of p v outside the set
  Comparison comparison;

  explicit Case(bool weighted) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const Attention a = layer.attention();
    for (i64 h = 0; h < kHeads; ++h) {
      for (i64 i = 0; i < kQueries; ++i) {
        RowSet set;
        for (i32 j = 0; j <= layer.slot(i); ++j)
          if (i % 10 != 4 && random() % 3 == 0) set.slots.push_back(j);
        sets.push_back(set);
        double kept = 0, weighed = 0;
        std::vector<double> dense(kDim), plain(kDim), sparse(kDim), lost(kDim);
        for (i64 j = 0; j <= layer.slot(i); ++j) {
          const double p = layer.probability(h, i, j), w = weighted ? p * (1 + 0.5 * static_cast<double>(j % 4)) : p;
          const bool reads = layer.reads(set, i, j);
          kept += reads ? p : 0;
          weighed += reads ? w : 0;
          for (i32 c = 0; c < kDim; ++c) {
            const auto at = static_cast<std::size_t>(c);
            const double v = a.kv.value(h / 2, j, c);
            dense[at] += p * v;
            plain[at] += reads ? p * v : 0;
            sparse[at] += reads ? w * v : 0;
            lost[at] += reads ? 0 : p * v;
          }
        }
        mass.push_back(kept);
        const float lse = layer.lse[static_cast<std::size_t>(h * kQueries + i)];
        sparse_lse.push_back(static_cast<float>(lse + std::log(weighed)));
        for (std::size_t c = 0; c < kDim; ++c) {
          dense_out.push_back(static_cast<float>(dense[c]));
          sparse_out.push_back(static_cast<float>(kept > 0 ? sparse[c] / weighed : 0));
          unweighted_out.push_back(static_cast<float>(kept > 0 ? plain[c] / kept : 0));
          dropped.push_back(lost[c]);
        }
      }
    }
    wo.resize(kModel * kHeads * kDim);
    for (float& x : wo) x = normal(random);
    comparison = {kHeads,
                  kDim,
                  kQueries,
                  dense_out.data(),
                  layer.lse.data(),
                  sparse_out.data(),
                  sparse_lse.data(),
                  mass.data(),
                  weighted ? unweighted_out.data() : nullptr,
                  {wo.data(), sdk::Dtype::f32, {kModel, kHeads * kDim}},
                  nullptr,
                  nullptr};
  }

  static double norm(const auto& x, std::size_t begin) {
    double sum = 0;
    for (std::size_t c = begin; c < begin + kDim; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    return std::sqrt(sum);
  }
};

std::vector<float> values(const std::string& name, const Comparison& comparison) {
  return evaluate(find_metric(name), comparison).value;
}

void check_equal(double found, double expected, double epsilon) {
  CHECK(found == doctest::Approx(expected).epsilon(epsilon));
}

}  // namespace

TEST_CASE("the registry: complete, unique, and an unknown name is answered with a near one") {
  std::set<std::string> names;
  for (const Metric& metric : metrics()) {
    CHECK(names.insert(metric.name).second);
    CHECK_FALSE(metric.unit.empty());
    CHECK_FALSE(metric.formula.empty());
    CHECK(static_cast<bool>(metric.evaluate));
    CHECK(metric.scale.lo < metric.scale.hi);
    CHECK((metric.scale.kind == HistogramScale::Kind::linear || metric.scale.lo > 0));
    CHECK(&find_metric(metric.name) == &metric);
  }
  CHECK(names.size() >= 7);
  CHECK_THROWS_WITH_AS(find_metric("mass_keep"), doctest::Contains("mass_kept"), Error);
}

TEST_CASE("every metric against fp64, with and without log weights") {
  for (const bool weighted : {false, true}) {
    const Case c(weighted);
    const auto mass = values("mass_kept", c.comparison), lse = values("lse_error", c.comparison),
               l2 = values("output_rel_l2", c.comparison), cosine = values("output_cosine", c.comparison),
               tail = values("tail_value_bias", c.comparison);
    REQUIRE(mass.size() == kHeads * kQueries);
    for (std::size_t i = 0; i < kHeads * kQueries; ++i) {
      const std::size_t row = i * kDim;
      double difference = 0, product = 0;
      for (std::size_t k = row; k < row + kDim; ++k) {
        difference += std::pow(static_cast<double>(c.sparse_out[k]) - c.dense_out[k], 2);
        product += static_cast<double>(c.sparse_out[k]) * c.dense_out[k];
      }
      const double dense = Case::norm(c.dense_out, row), sparse = Case::norm(c.sparse_out, row);
      check_equal(mass[i], c.mass[i], 1e-6);
      check_equal(l2[i], std::sqrt(difference) / dense, 1e-6);
      check_equal(tail[i], Case::norm(c.dropped, row) / dense, 1e-5);
      if (c.mass[i] > 0) {
        check_equal(cosine[i], product / dense / sparse, 1e-6);
        check_equal(lse[i], static_cast<double>(c.sparse_lse[i]) - c.layer.lse[i], 1e-6);
        if (!weighted) CHECK(std::abs(lse[i] - std::log(c.mass[i])) < 2e-6);
      } else {  // read nothing
        CHECK(mass[i] == 0);
        CHECK(lse[i] == -std::numeric_limits<float>::infinity());
        CHECK(l2[i] == doctest::Approx(1));
        CHECK(cosine[i] == 0);
        CHECK(tail[i] == doctest::Approx(1));
      }
    }
  }
}

TEST_CASE("layer_rel_l2 joins the heads, one sample a query, for every type of W_O") {
  Case c(false);
  std::vector<sdk::u16> half(c.wo.size());
  for (std::size_t i = 0; i < half.size(); ++i) {
    half[i] = sdk::to_bf16(c.wo[i]);
    c.wo[i] = sdk::from_bf16(half[i]);
  }
  std::vector<double> error(kQueries), scale(kQueries);
  for (std::size_t i = 0; i < kQueries; ++i) {
    for (std::size_t m = 0; m < kModel; ++m) {
      double e = 0, d = 0;
      for (std::size_t h = 0; h < kHeads; ++h) {
        for (std::size_t k = 0; k < kDim; ++k) {
          const std::size_t at = (h * kQueries + i) * kDim + k;
          const double w = c.wo[m * kHeads * kDim + h * kDim + k];
          e += w * (static_cast<double>(c.sparse_out[at]) - c.dense_out[at]);
          d += w * c.dense_out[at];
        }
      }
      error[i] += e * e;
      scale[i] += d * d;
    }
    scale[i] = std::sqrt(scale[i]);
  }
  const Metric& metric = find_metric("layer_rel_l2");
  const auto check = [&] {
    const Samples samples = evaluate(metric, c.comparison);
    REQUIRE(samples.rows == 1);
    REQUIRE(samples.value.size() == kQueries);
    for (std::size_t i = 0; i < kQueries; ++i) check_equal(samples.value[i], std::sqrt(error[i]) / scale[i], 1e-5);
  };
  check();
  c.comparison.wo = {half.data(), sdk::Dtype::bf16, {kModel, kHeads * kDim}};
  check();
  c.comparison.dense_projected = scale.data();
  check();

  c.comparison.wo.shape = {kModel, kHeads * kDim + 1};
  CHECK_THROWS_AS(evaluate(metric, c.comparison), Error);
  c.comparison.wo = {};
  CHECK(evaluate(metric, c.comparison).rows == 0);
}

TEST_CASE("regret is there when the oracle ran") {
  Case c(false);
  CHECK(evaluate(find_metric("regret"), c.comparison).rows == 0);
  std::vector<double> regret(kHeads * kQueries, 0.25);
  c.comparison.regret = regret.data();
  const Samples samples = evaluate(find_metric("regret"), c.comparison);
  CHECK(samples.rows == kHeads);
  CHECK(samples.value == std::vector<float>(kHeads * kQueries, 0.25f));
}
