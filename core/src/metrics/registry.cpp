#include <algorithm>
#include <cmath>

#include "lacuna/base/error.hpp"
#include "lacuna/metrics/metric.hpp"

namespace lacuna {

#define METRIC(name) Metric name##_metric();
#include "list.def"
#undef METRIC

const std::vector<Metric>& metrics() {
  static const std::vector<Metric> all = {
#define METRIC(name) name##_metric(),
#include "list.def"
#undef METRIC
  };
  return all;
}

const Metric& find_metric(const std::string& name) {
  std::vector<std::string> known;
  for (const Metric& metric : metrics()) {
    if (metric.name == name) return metric;
    known.push_back(metric.name);
  }
  throw Error(Problem{"unknown metric", "", "'" + name + "'", "", suggestion(name, known)});
}

Samples evaluate(const Metric& metric, const Comparison& comparison) {
  if (metric.available && !metric.available(comparison)) return {};
  Samples samples{metric.per_query ? 1 : comparison.heads, comparison.queries, {}};
  samples.value.resize(static_cast<std::size_t>(samples.rows * samples.queries));
  metric.evaluate(comparison, samples.value.data());
  return samples;
}

int HistogramScale::bin(double value) const {
  if (!(value > lo)) return 0;
  if (value >= hi) return kBins - 1;
  const double share = kind == Kind::linear ? (value - lo) / (hi - lo)
                                            : (std::log(value) - std::log(lo)) / (std::log(hi) - std::log(lo));
  return std::clamp(static_cast<int>(share * kBins), 0, kBins - 1);
}

double HistogramScale::edge(int index) const {
  const double share = static_cast<double>(index) / kBins;
  return kind == Kind::linear ? lo + share * (hi - lo) : lo * std::pow(hi / lo, share);
}

}  // namespace lacuna
