// The share of dense attention that the method read at all; nothing that is done with it afterwards can bring back the
// rest.
#include "lacuna/metrics/metric.hpp"

namespace lacuna {

Metric mass_kept_metric() {
  Metric m;
  m.name = "mass_kept";
  m.unit = "probability";
  m.formula = "sum over the keys j that query q read of p_qj";
  m.better = Better::up;
  m.scale = {HistogramScale::Kind::linear, 0, 1};
  m.evaluate = [](const Comparison& c, float* out) {
    for (sdk::i64 i = 0; i < c.heads * c.queries; ++i) out[i] = static_cast<float>(c.mass_kept[i]);
  };
  return m;
}

}  // namespace lacuna
