// Intervals by resampling. Queries near each other are alike, so stretches of blocks are drawn, not single ones: Künsch
// 1989, "The jackknife and the bootstrap for general stationary observations".
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "lacuna/base/error.hpp"
#include "lacuna/metrics/statistics.hpp"

namespace lacuna {
namespace {

using sdk::i64;
using sdk::u64;

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

/// The 2.5 % and 97.5 % points, linear between order statistics. Reorders `values`.
Interval percentiles(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double rank = share * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(rank);
    const std::size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (rank - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(0.025), at(0.975)};
}

/// What percentiles of the draws fall short by when the series is only a few stretches long. Drawn means vary less than
/// the mean does by (n - length) / n, because they deviate from the series' own mean; and their spread is itself known
/// from few stretches: Student's t for the normal quantile, with the 1.5 n / length degrees of freedom that overlapping
/// stretches give (Meketon and Schmeiser 1984, "Overlapping batch means").
double widening(i64 n, i64 length) {
  constexpr double z = 1.959964, z2 = z * z;
  const double v = 1.5 * static_cast<double>(n) / static_cast<double>(length) - 1;
  // t / z in powers of 1 / v (Abramowitz and Stegun 26.7.5): exact to 1 % from v = 3.5, the least that summarize() asks
  // for.
  const double t = 1 + (z2 + 1) / (4 * v) + (5 * z2 * z2 + 16 * z2 + 3) / (96 * v * v) +
                   (3 * z2 * z2 * z2 + 19 * z2 * z2 + 17 * z2 - 15) / (384 * v * v * v);
  return t * std::sqrt(static_cast<double>(n) / static_cast<double>(n - length));
}

/// Mean over the series of sum / count; a series without samples is left out.
class MeanOfRatios {
 public:
  void add(double sum, double count) {
    if (count <= 0) return;
    total_ += sum / count;
    ++series_;
  }
  double value() const { return total_ / series_; }  // NaN without any

 private:
  double total_ = 0;
  int series_ = 0;
};

void check_same_blocks(const Metric& metric, const std::vector<const LayerStats*>& layers) {
  for (const LayerStats* layer : layers) {
    if (layer->blocks == layers.front()->blocks && layer->rows == layers.front()->rows) continue;
    throw Error(Problem{"layers cannot be pooled", "the same blocks and heads in all of them",
                        std::to_string(layer->blocks.size()) + " blocks of " + std::to_string(layer->rows) +
                            " heads beside " + std::to_string(layers.front()->blocks.size()) + " of " +
                            std::to_string(layers.front()->rows),
                        "metric " + metric.name, "collect them with one layout"});
  }
  if (layers.empty())
    throw Error(Problem{"nothing to summarize", "at least one layer", "none", "metric " + metric.name, ""});
}

}  // namespace

LayerStats pool_runs(const Metric& metric, const std::vector<const LayerStats*>& runs) {
  check_same_blocks(metric, runs);
  LayerStats out = *runs.front();
  for (std::size_t r = 1; r < runs.size(); ++r)
    for (std::size_t i = 0; i < out.cells.size(); ++i) out.cells[i].merge(runs[r]->cells[i]);
  return out;
}

i64 resample_length(i64 blocks) { return static_cast<i64>(std::ceil(std::cbrt(static_cast<double>(blocks)) - 1e-9)); }

Interval moving_block_interval(const std::vector<std::vector<double>>& sum,
                               const std::vector<std::vector<double>>& count, i64 length, u64 seed) {
  const auto n = static_cast<i64>(sum.front().size());
  // Sums of the first i elements, so that a stretch costs two look-ups.
  std::vector<std::vector<double>> sum_to(sum.size()), count_to(sum.size());
  for (std::size_t s = 0; s < sum.size(); ++s) {
    sum_to[s].assign(static_cast<std::size_t>(n + 1), 0);
    count_to[s] = sum_to[s];
    std::partial_sum(sum[s].begin(), sum[s].end(), sum_to[s].begin() + 1);
    std::partial_sum(count[s].begin(), count[s].end(), count_to[s].begin() + 1);
  }
  MeanOfRatios observed;
  for (std::size_t s = 0; s < sum.size(); ++s) observed.add(sum_to[s].back(), count_to[s].back());

  const sdk::Random random{seed, 0};
  const auto starts = static_cast<u64>(n - length + 1);
  const auto draws = static_cast<std::size_t>((n + length - 1) / length);
  std::vector<std::size_t> start(draws);
  std::vector<double> means;
  for (u64 resample = 0; resample < kResamples; ++resample) {
    for (std::size_t d = 0; d < draws; ++d) start[d] = static_cast<std::size_t>(random.bits(resample, d) % starts);
    MeanOfRatios mean;
    for (std::size_t s = 0; s < sum.size(); ++s) {
      double drawn_sum = 0, drawn_count = 0;
      for (std::size_t d = 0; d < draws; ++d) {
        const auto stretch = static_cast<std::size_t>(std::min(length, n - static_cast<i64>(d) * length));
        drawn_sum += sum_to[s][start[d] + stretch] - sum_to[s][start[d]];
        drawn_count += count_to[s][start[d] + stretch] - count_to[s][start[d]];
      }
      mean.add(drawn_sum, drawn_count);
    }
    if (std::isfinite(mean.value())) means.push_back(mean.value());
  }
  // Overlapping stretches reach the ends of the series less often than its middle, so the draws' centre is not the
  // mean.
  const double centre = mean_of(means);
  const double widen = widening(n, length);
  const Interval drawn = percentiles(means);
  return {observed.value() + widen * (drawn.lo - centre), observed.value() + widen * (drawn.hi - centre)};
}

Summary summarize(const Metric& metric, const std::vector<const LayerStats*>& layers, u64 seed) {
  check_same_blocks(metric, layers);
  const std::vector<Block>& blocks = layers.front()->blocks;
  Summary summary;
  BlockStats pooled;
  MeanOfRatios mean, answer;
  std::vector<std::vector<double>> sums, counts;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerStats& layer = *layers[l];
    std::vector<double> sum(blocks.size()), count(blocks.size());
    double answer_sum = 0, answer_count = 0;
    for (sdk::i32 row = 0; row < layer.rows; ++row) {
      BlockStats head;
      for (std::size_t b = 0; b < blocks.size(); ++b) {
        const BlockStats& cell = layer.cells[static_cast<std::size_t>(row) * blocks.size() + b];
        head.merge(cell);
        sum[b] += cell.sum;
        count[b] += static_cast<double>(cell.count);
      }
      const bool first = pooled.count == 0;
      pooled.merge(head);
      const bool worse =
          metric.better == Better::up ? head.mean() < summary.worst_head : head.mean() > summary.worst_head;
      if (head.count > 0 && (first || worse)) {
        summary.worst_head = head.mean();
        summary.worst_layer_index = static_cast<int>(l);
        summary.worst_head_index = metric.per_query ? -1 : row;
      }
    }
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      if (!blocks[b].answer) continue;
      answer_sum += sum[b];
      answer_count += count[b];
    }
    answer.add(answer_sum, answer_count);
    mean.add(std::accumulate(sum.begin(), sum.end(), 0.0), std::accumulate(count.begin(), count.end(), 0.0));
    sums.push_back(std::move(sum));
    counts.push_back(std::move(count));
  }
  summary.mean = mean.value();
  summary.p1 = pooled.quantile(metric.better == Better::up ? 0.01 : 0.99, metric.scale);
  summary.undefined = pooled.undefined;
  if (pooled.count == 0) summary.worst_head = std::numeric_limits<double>::quiet_NaN();
  if (std::isfinite(answer.value())) summary.answer_mean = answer.value();

  // Blocks without a query that takes part are no part of the series.
  for (std::size_t s = 0; s < sums.size(); ++s) {
    std::size_t to = 0;
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      if (blocks[b].queries == 0) continue;
      sums[s][to] = sums[s][b];
      counts[s][to++] = counts[s][b];
    }
    sums[s].resize(to);
    counts[s].resize(to);
  }
  for (const Block& block : blocks) summary.queries += block.queries;
  summary.blocks = static_cast<i64>(sums.front().size());
  if (summary.blocks < kLeastBlocks) {
    summary.note = "n = " + std::to_string(summary.blocks) + " blocks, no interval";
  } else if (pooled.count == 0) {
    summary.note = "no defined sample, no interval";
  } else {
    summary.interval = moving_block_interval(sums, counts, resample_length(summary.blocks), seed);
  }
  return summary;
}

TracesSummary pool_traces(const std::vector<TraceMean>& traces, u64 seed) {
  std::map<std::string, std::vector<double>> contexts;
  std::vector<std::vector<double>> clusters;
  std::vector<double> all;
  for (const TraceMean& trace : traces) {
    all.push_back(trace.mean);
    if (trace.context.empty())
      clusters.push_back({trace.mean});
    else
      contexts[trace.context].push_back(trace.mean);
  }
  for (auto& [name, means] : contexts) clusters.push_back(std::move(means));

  TracesSummary summary{mean_of(all), static_cast<i64>(all.size()), static_cast<i64>(clusters.size()), {}, ""};
  if (summary.clusters < kLeastTraces) {
    summary.note = "n = " + std::to_string(summary.traces) + " traces" +
                   (summary.clusters < summary.traces ? " of " + std::to_string(summary.clusters) + " contexts" : "") +
                   ", no interval across prompts";
    return summary;
  }
  const sdk::Random random{seed, 0};
  std::vector<double> means;
  for (u64 resample = 0; resample < kResamples; ++resample) {
    double sum = 0, count = 0;
    for (std::size_t d = 0; d < clusters.size(); ++d) {
      for (const double mean : clusters[random.bits(resample, d) % clusters.size()]) {
        sum += mean;
        ++count;
      }
    }
    means.push_back(sum / count);
  }
  summary.interval = percentiles(means);
  return summary;
}

}  // namespace lacuna
