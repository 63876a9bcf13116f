#include "lacuna/metrics/statistics.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "lacuna/base/error.hpp"

using namespace lacuna;
using sdk::i64;

namespace {

Metric linear_metric(Better better) {
  Metric metric;
  metric.name = "test";
  metric.better = better;
  metric.scale = {HistogramScale::Kind::linear, 0, 1};
  return metric;
}

BlockStats stats_of(const std::vector<float>& samples, const HistogramScale& scale) {
  BlockStats stats;
  for (const float x : samples) stats.add(x, scale);
  return stats;
}

bool same(const BlockStats& a, const BlockStats& b) {
  return a.count == b.count && a.undefined == b.undefined && a.min == b.min && a.max == b.max &&
         a.histogram == b.histogram && a.sum == doctest::Approx(b.sum) &&
         a.sum_squares == doctest::Approx(b.sum_squares);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("blocks end at their length, at borders and at the answer span, and cover every query") {
  const BlockLayout plain = make_blocks(150, 64, {});
  CHECK(plain.blocks == std::vector<Block>{{0, 64, 64}, {64, 128, 64}, {128, 150, 22}});
  const BlockLayout cut = make_blocks(150, 64, {70, 500, -3, 0, 70, 150}, {140, 150});
  CHECK(cut.blocks == std::vector<Block>{{0, 64, 64}, {64, 70, 6}, {70, 134, 64}, {134, 140, 6}, {140, 150, 10, true}});
  CHECK(make_blocks(0, 64, {10}).blocks.empty());
  std::vector<sdk::u8> mask(150, 1);
  std::fill(mask.begin(), mask.begin() + 70, sdk::u8{0});
  const BlockLayout masked = make_blocks(150, 64, {}, {}, mask);
  CHECK(masked.blocks == std::vector<Block>{{0, 64, 0}, {64, 128, 58}, {128, 150, 22}});
}

TEST_CASE("histogram bins: linear and log, edges, values beyond the scale") {
  const HistogramScale linear{HistogramScale::Kind::linear, -1, 1}, log{HistogramScale::Kind::log, 1e-4, 1};
  CHECK(linear.bin(-5) == 0);
  CHECK(linear.bin(-1) == 0);
  CHECK(linear.bin(0) == 32);
  CHECK(linear.bin(1) == 63);
  CHECK(log.bin(0) == 0);
  CHECK(log.bin(-2) == 0);
  CHECK(log.bin(1.01e-2) == 32);
  CHECK(log.bin(50) == 63);
  for (const HistogramScale& scale : {linear, log}) {
    for (int i = 0; i < HistogramScale::kBins; ++i) {
      CHECK(scale.bin((scale.edge(i) + scale.edge(i + 1)) / 2) == i);
      CHECK(scale.edge(i) < scale.edge(i + 1));
    }
    CHECK(scale.edge(64) == doctest::Approx(scale.hi));
  }
}

TEST_CASE("p1 from the histogram lies within a bin of the sorted samples', on the bad side") {
  std::mt19937 random(1);
  std::lognormal_distribution<float> skewed(-3, 1);
  std::vector<float> samples(5000);
  for (float& x : samples) x = skewed(random);
  std::vector<float> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  const BlockLayout layout = make_blocks(5000, 64, {});
  for (const Better better : {Better::up, Better::down}) {
    for (const HistogramScale& scale :
         {HistogramScale{HistogramScale::Kind::linear, 0, 1}, HistogramScale{HistogramScale::Kind::log, 1e-4, 10}}) {
      Metric metric = linear_metric(better);
      metric.scale = scale;
      const LayerStats stats = collect(metric, {1, 5000, samples}, layout);
      const double expected = better == Better::up ? sorted[50] : sorted[4950];
      const int bin = scale.bin(expected);
      const double p1 = summarize(metric, {&stats}).p1;
      CHECK(std::abs(p1 - expected) <= scale.edge(bin + 1) - scale.edge(bin));
      CHECK(p1 >= sorted.front());
      CHECK(p1 <= sorted.back());
    }
  }
  // Samples beyond the scale: the extremes bound the outer bins.
  const HistogramScale unit{HistogramScale::Kind::linear, 0, 1};
  CHECK(stats_of({7, 7, 7}, unit).quantile(0.99, unit) == 7);
  CHECK(stats_of({-4, -4}, unit).quantile(0.01, unit) == -4);
  CHECK(std::isnan(stats_of({}, unit).quantile(0.5, unit)));
}

TEST_CASE("merging block statistics is associative and commutative and equals adding all samples") {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0.5f, 0.4f);
  const HistogramScale scale{HistogramScale::Kind::linear, 0, 1};
  std::vector<std::vector<float>> parts(3, std::vector<float>(41));
  std::vector<float> all;
  for (auto& part : parts) {
    for (float& x : part) x = normal(random);
    part[7] = -kInfinity;
    all.insert(all.end(), part.begin(), part.end());
  }
  const BlockStats a = stats_of(parts[0], scale), b = stats_of(parts[1], scale), c = stats_of(parts[2], scale);
  BlockStats left = a, right = b, swapped = c;
  left.merge(b);
  left.merge(c);
  right.merge(c);
  BlockStats nested = a;
  nested.merge(right);
  swapped.merge(a);
  swapped.merge(b);
  CHECK(same(left, nested));
  CHECK(same(left, swapped));
  CHECK(same(left, stats_of(all, scale)));
  CHECK(left.undefined == 3);
  CHECK(left.count == 120);
  BlockStats identity;
  identity.merge(a);
  CHECK(same(identity, a));
}

TEST_CASE("an undefined sample is counted and enters nothing else; masked queries are not there") {
  const Metric metric = linear_metric(Better::up);
  std::vector<sdk::u8> mask(10, 1);
  mask[0] = mask[1] = 0;
  const BlockLayout layout = make_blocks(10, 8, {}, {8, 10}, mask);
  Samples samples{2, 10, std::vector<float>(20, 0.5f)};
  samples.value[0] = 0;  // masked
  samples.value[3] = -kInfinity;
  samples.value[4] = std::nanf("");
  samples.value[18] = samples.value[19] = 0.25f;  // head 1, answer
  const LayerStats stats = collect(metric, samples, layout);
  const Summary summary = summarize(metric, {&stats});
  CHECK(summary.undefined == 2);
  CHECK(summary.queries == 8);
  CHECK(summary.blocks == 2);
  CHECK(summary.mean == doctest::Approx((12 * 0.5 + 2 * 0.25) / 14));
  CHECK(summary.worst_head == doctest::Approx((6 * 0.5 + 2 * 0.25) / 8));
  CHECK(summary.worst_head_index == 1);
  CHECK(*summary.answer_mean == doctest::Approx(0.375));
  CHECK_FALSE(summary.interval.has_value());
  CHECK(summary.note == "n = 2 blocks, no interval");
  CHECK(stats.cells[0].min == 0.5);
  CHECK(stats.cells[1].sum_squares == doctest::Approx(0.5));
}

TEST_CASE("the worst head is the one on the bad side, and layers are fixed effects") {
  const BlockLayout layout = make_blocks(512, 64, {});
  std::vector<float> first(3 * 512, 0.5f), second(3 * 512, 0.7f);
  std::fill(first.begin() + 512, first.begin() + 1024, 0.9f);
  std::fill(second.begin() + 1024, second.end(), 0.1f);
  for (const Better better : {Better::up, Better::down}) {
    const Metric metric = linear_metric(better);
    const LayerStats a = collect(metric, {3, 512, first}, layout), b = collect(metric, {3, 512, second}, layout);
    const Summary summary = summarize(metric, {&a, &b});
    CHECK(summary.mean == doctest::Approx((1.9 / 3 + 1.5 / 3) / 2).epsilon(1e-6));
    CHECK(summary.worst_head == doctest::Approx(better == Better::up ? 0.1 : 0.9).epsilon(1e-6));
    CHECK(summary.worst_layer_index == (better == Better::up ? 1 : 0));
    CHECK(summary.worst_head_index == (better == Better::up ? 2 : 1));
    CHECK(summary.interval->lo == doctest::Approx(summary.mean));  // differences between heads and layers are no noise
    CHECK(summary.interval->hi == doctest::Approx(summary.mean));
    CHECK_FALSE(summary.answer_mean.has_value());
    const LayerStats shorter = collect(metric, {3, 512, first}, make_blocks(512, 32, {}));
    CHECK_THROWS_AS(summarize(metric, {&a, &shorter}), Error);
    CHECK_THROWS_AS(summarize(metric, {}), Error);
  }
}

TEST_CASE("layers are resampled together: noise that they share does not average out, opposite noise cancels") {
  std::mt19937 random(4);
  std::uniform_real_distribution<float> uniform;
  std::vector<float> noise(2048), mirrored(2048);
  for (std::size_t i = 0; i < noise.size(); ++i) {
    noise[i] = uniform(random);
    mirrored[i] = 1 - noise[i];
  }
  const Metric metric = linear_metric(Better::up);
  const BlockLayout layout = make_blocks(2048, 64, {});
  const LayerStats a = collect(metric, {1, 2048, noise}, layout), b = collect(metric, {1, 2048, mirrored}, layout);
  const auto width = [&](std::vector<const LayerStats*> layers) {
    const Interval interval = *summarize(metric, layers).interval;
    return interval.hi - interval.lo;
  };
  CHECK(width({&a}) > 0.005);
  CHECK(width({&a, &a}) == doctest::Approx(width({&a})));
  CHECK(width({&a, &b}) < 1e-6);
  CHECK(summarize(metric, {&a}).interval->lo == summarize(metric, {&a}).interval->lo);
  CHECK(summarize(metric, {&a}, 1).interval->lo != summarize(metric, {&a}, 2).interval->lo);
}

TEST_CASE("five blocks have no interval, six do") {
  const Metric metric = linear_metric(Better::up);
  for (const i64 queries : {40, 48}) {
    std::vector<float> samples(static_cast<std::size_t>(queries));
    for (std::size_t i = 0; i < samples.size(); ++i) samples[i] = static_cast<float>(i % 11) / 11;
    const LayerStats stats = collect(metric, {1, queries, samples}, make_blocks(queries, kLaterBlock, {}));
    const Summary summary = summarize(metric, {&stats});
    CHECK(summary.interval.has_value() == (queries == 48));
    CHECK(summary.note == (queries == 48 ? "" : "n = 5 blocks, no interval"));
  }
}

TEST_CASE("blocks in which no query takes part are no blocks") {
  std::vector<sdk::u8> mask(80, 1);
  std::fill(mask.begin(), mask.begin() + 40, sdk::u8{0});
  const Metric metric = linear_metric(Better::up);
  const LayerStats stats =
      collect(metric, {1, 80, std::vector<float>(80, 0.5f)}, make_blocks(80, kLaterBlock, {}, {}, mask));
  CHECK(summarize(metric, {&stats}).note == "n = 5 blocks, no interval");
}

TEST_CASE("on an AR(1) series intervals from moving blocks cover the mean, those of independent queries do not") {
  constexpr int kBlocks = 32, kSeries = 400;
  constexpr double kPhi = 0.9;  // a query's influence fades over ten or so
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  int covered = 0, covered_iid = 0;
  for (int series = 0; series < kSeries; ++series) {
    double x = normal(random) / std::sqrt(1 - kPhi * kPhi), total = 0, squares = 0;
    std::vector<double> sum(kBlocks), count(kBlocks, kPrefillBlock);
    for (double& block : sum) {
      for (i64 i = 0; i < kPrefillBlock; ++i) {
        x = kPhi * x + normal(random);
        block += x;
        squares += x * x;
      }
      total += block;
    }
    const Interval interval =
        moving_block_interval({sum}, {count}, resample_length(kBlocks), static_cast<sdk::u64>(series));
    covered += interval.lo <= 0 && interval.hi >= 0;
    constexpr double n = kBlocks * kPrefillBlock;
    covered_iid += std::abs(total / n) <= 1.96 * std::sqrt(squares / n / n);
  }
  CHECK(covered > 0.91 * kSeries);
  CHECK(covered < 0.98 * kSeries);
  CHECK(covered_iid < 0.5 * kSeries);
}

TEST_CASE("traces: an interval across prompts from eight contexts on") {
  std::vector<TraceMean> traces;
  for (int i = 0; i < 7; ++i) traces.push_back({0.1 * i, ""});
  CHECK(pool_traces(traces).note == "n = 7 traces, no interval across prompts");
  CHECK(pool_traces(traces).mean == doctest::Approx(0.3));
  traces.push_back({0.7, ""});
  const TracesSummary eight = pool_traces(traces);
  CHECK(eight.mean == doctest::Approx(0.35));
  REQUIRE(eight.interval.has_value());
  const double error = 1.96 * std::sqrt(0.0525 / 8);  // of the population {0, .1, ..., .7}
  CHECK(eight.interval->lo == doctest::Approx(0.35 - error).epsilon(0.1));
  CHECK(eight.interval->hi == doctest::Approx(0.35 + error).epsilon(0.1));
  for (TraceMean& trace : traces) trace.context = "one";
  CHECK(pool_traces(traces).note == "n = 8 traces of 1 contexts, no interval across prompts");
}
