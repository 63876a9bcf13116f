// Samples become stored block statistics, and those become a mean, its tail and an honest interval (docs/metrics.md).
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/metrics/metric.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Queries of a block: prefill, and decode or after a cut.
inline constexpr sdk::i64 kPrefillBlock = 64, kLaterBlock = 8;
inline constexpr int kResamples = 1000;
inline constexpr sdk::i64 kLeastBlocks = 6, kLeastTraces = 8;

/// Consecutive queries [begin, end) of a comparison, of which `queries` take part.
struct Block {
  sdk::i64 begin = 0, end = 0, queries = 0;
  bool answer = false;  // inside the answer span
  bool operator==(const Block&) const = default;
};

struct QuerySpan {
  sdk::i64 begin = 0, end = 0;
};

/// How a comparison's queries are cut into blocks, and which of them take part. Equal for all methods that are
/// compared.
struct BlockLayout {
  std::vector<Block> blocks;  // in time order, covering every query
  std::vector<sdk::u8> mask;  // [queries] 1: takes part; empty: all do
};

/// Blocks of `length` queries; one also ends at each border (query indices, any order, those outside are ignored) and
/// at the ends of the answer span, and the next starts there.
BlockLayout make_blocks(sdk::i64 queries, sdk::i64 length, const std::vector<sdk::i64>& borders, QuerySpan answer = {},
                        std::vector<sdk::u8> mask = {});

/// What is stored of one (layer, head, block). `merge` is associative and commutative: exactly in counts, extremes and
/// the histogram, to fp64 rounding in the sums.
struct BlockStats {
  sdk::i64 count = 0;      // defined samples
  sdk::i64 undefined = 0;  // NaN or infinite samples: in no other field
  double sum = 0, sum_squares = 0;
  double min = std::numeric_limits<double>::infinity(), max = -std::numeric_limits<double>::infinity();
  std::array<sdk::u32, HistogramScale::kBins> histogram{};

  void add(double sample, const HistogramScale& scale);
  void merge(const BlockStats& other);
  double mean() const;  // NaN without samples
  /// From the histogram, linear inside a bin and never outside [min, max]: wrong by at most one bin's width.
  double quantile(double share, const HistogramScale& scale) const;
};

/// Statistics of one metric over one layer of one trace.
struct LayerStats {
  sdk::i32 rows = 0;  // heads, or 1 (Metric::per_query)
  std::vector<Block> blocks;
  std::vector<BlockStats> cells;  // [rows, blocks]
};

LayerStats collect(const Metric& metric, const Samples& samples, const BlockLayout& layout);

/// Runs of one layer that differ in their seeds alone, as one: each head's and block's samples of all of them. Throws
/// Error when there is none, or their blocks differ.
LayerStats pool_runs(const Metric& metric, const std::vector<const LayerStats*>& runs);

struct Interval {
  double lo = 0, hi = 0;
};

/// Layers and heads are fixed effects: `mean` is the mean of the layers' means; the interval speaks of other stretches
/// of the same text, not of other texts.
struct Summary {
  double mean = 0;
  double p1 = 0;                      // the worst 1 % of the samples lie beyond it
  double worst_head = 0;              // mean of the worst (layer, head)
  int worst_layer_index = 0;          // index into the layers given
  int worst_head_index = -1;          // -1: the metric has one sample a query
  std::optional<double> answer_mean;  // over the answer span; none: no query of it takes part
  sdk::i64 queries = 0, blocks = 0;   // that take part
  sdk::i64 undefined = 0;             // samples left out of everything above
  std::optional<Interval> interval;   // 95 %
  std::string note;                   // why there is no interval
};

/// Throws Error when there is no layer or the layers' blocks differ. Equal seeds resample equal blocks, for all layers
/// and (with equal layouts) all methods.
Summary summarize(const Metric& metric, const std::vector<const LayerStats*>& layers, sdk::u64 seed = 0);

/// Blocks that are drawn together: ceil(cbrt(k)).
sdk::i64 resample_length(sdk::i64 blocks);

/// 95 % interval of the mean over series of the ratio sum / count, from moving blocks of `length` < k consecutive
/// elements: kResamples draws, the same ones for all series; percentiles of their deviations from their centre, widened
/// for short series (docs/metrics.md). sum, count [series][k]. A series whose drawn counts are all 0 is left out of
/// that draw.
Interval moving_block_interval(const std::vector<std::vector<double>>& sum,
                               const std::vector<std::vector<double>>& count, sdk::i64 length, sdk::u64 seed);

/// One trace of one model. Traces that share a context are one cluster; empty: a cluster of its own.
struct TraceMean {
  double mean = 0;
  std::string context;
};

struct TracesSummary {
  double mean = 0;
  sdk::i64 traces = 0, clusters = 0;
  std::optional<Interval> interval;  // 95 %, across prompts
  std::string note;
};

/// Cluster bootstrap over at least kLeastTraces clusters. Models are never pooled: call it for each.
TracesSummary pool_traces(const std::vector<TraceMean>& traces, sdk::u64 seed = 0);

}  // namespace lacuna
