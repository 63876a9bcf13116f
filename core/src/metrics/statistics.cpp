#include "lacuna/metrics/statistics.hpp"

#include <algorithm>
#include <cmath>

namespace lacuna {

using sdk::i64;

BlockLayout make_blocks(i64 queries, i64 length, const std::vector<i64>& borders, QuerySpan answer,
                        std::vector<sdk::u8> mask) {
  std::vector<i64> ends = borders;
  ends.insert(ends.end(), {answer.begin, answer.end, queries});
  std::sort(ends.begin(), ends.end());
  BlockLayout layout{{}, std::move(mask)};
  i64 begin = 0;
  for (const i64 border : ends) {
    for (const i64 stop = std::min(border, queries); begin < stop;) {
      Block block{begin, std::min(begin + length, stop), 0, begin >= answer.begin && begin < answer.end};
      for (i64 q = block.begin; q < block.end; ++q) {
        block.queries += layout.mask.empty() || layout.mask[static_cast<std::size_t>(q)] != 0;
      }
      layout.blocks.push_back(block);
      begin = block.end;
    }
  }
  return layout;
}

void BlockStats::add(double sample, const HistogramScale& scale) {
  if (!std::isfinite(sample)) {
    ++undefined;
    return;
  }
  ++count;
  sum += sample;
  sum_squares += sample * sample;
  min = std::min(min, sample);
  max = std::max(max, sample);
  ++histogram[static_cast<std::size_t>(scale.bin(sample))];
}

void BlockStats::merge(const BlockStats& other) {
  count += other.count;
  undefined += other.undefined;
  sum += other.sum;
  sum_squares += other.sum_squares;
  min = std::min(min, other.min);
  max = std::max(max, other.max);
  for (std::size_t i = 0; i < histogram.size(); ++i) histogram[i] += other.histogram[i];
}

double BlockStats::mean() const { return sum / static_cast<double>(count); }

double BlockStats::quantile(double share, const HistogramScale& scale) const {
  if (count == 0) return std::numeric_limits<double>::quiet_NaN();
  const double rank = share * static_cast<double>(count);
  double below = 0;
  for (int i = 0; i < HistogramScale::kBins; ++i) {
    const double here = histogram[static_cast<std::size_t>(i)];
    if (here > 0 && below + here >= rank) {
      // The outer bins also hold what lies beyond the scale; the extremes are their true ends.
      const double lo = i == 0 ? min : std::max(min, scale.edge(i));
      const double hi = i == HistogramScale::kBins - 1 ? max : std::min(max, scale.edge(i + 1));
      return lo + (hi - lo) * (rank - below) / here;
    }
    below += here;
  }
  return max;
}

LayerStats collect(const Metric& metric, const Samples& samples, const BlockLayout& layout) {
  LayerStats stats{samples.rows, layout.blocks, {}};
  const auto blocks = static_cast<i64>(layout.blocks.size());
  stats.cells.resize(static_cast<std::size_t>(samples.rows * blocks));
#pragma omp parallel for schedule(static) if (samples.rows * samples.queries >= 4096)
  for (i64 cell = 0; cell < samples.rows * blocks; ++cell) {
    const Block& block = layout.blocks[static_cast<std::size_t>(cell % blocks)];
    const float* row = samples.value.data() + cell / blocks * samples.queries;
    for (i64 q = block.begin; q < block.end; ++q) {
      if (layout.mask.empty() || layout.mask[static_cast<std::size_t>(q)]) {
        stats.cells[static_cast<std::size_t>(cell)].add(row[q], metric.scale);
      }
    }
  }
  return stats;
}

}  // namespace lacuna
