// Mass that the same number of pairs could have read besides: how far the choice, and not the budget, is from the best.
#include "lacuna/metrics/metric.hpp"

namespace lacuna {

Metric regret_metric() {
  Metric m;
  m.name = "regret";
  m.unit = "probability";
  m.formula = "mass of oracle_matched at the row's realised pairs - mass_kept";
  m.better = Better::down;
  m.scale = {HistogramScale::Kind::log, 1e-5, 1};
  m.available = [](const Comparison& c) { return c.regret != nullptr; };
  m.evaluate = [](const Comparison& c, float* out) {
    for (sdk::i64 i = 0; i < c.heads * c.queries; ++i) out[i] = static_cast<float>(c.regret[i]);
  };
  return m;
}

}  // namespace lacuna
