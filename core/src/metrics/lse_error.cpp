// Error of the softmax normaliser. ln mass_kept for a plain subset; log weights may bring it back to 0, or above.
// A query that read nothing has -inf, which is counted as undefined: one such query would hide all others in a mean.
#include "lacuna/metrics/metric.hpp"

namespace lacuna {

Metric lse_error_metric() {
  Metric m;
  m.name = "lse_error";
  m.unit = "nat";
  m.formula = "lse_sparse - lse_dense";
  m.better = Better::up;
  m.scale = {HistogramScale::Kind::linear, -3.5, 0.5};
  m.evaluate = [](const Comparison& c, float* out) {
    for (sdk::i64 i = 0; i < c.heads * c.queries; ++i) {
      out[i] = static_cast<float>(static_cast<double>(c.sparse_lse[i]) - c.dense_lse[i]);
    }
  };
  return m;
}

}  // namespace lacuna
