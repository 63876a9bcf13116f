// Relative error of the attention block's contribution to the residual stream: heads weighted as W_O weights them.
#include <vector>

#include "lacuna/metrics/metric.hpp"

namespace lacuna {

Metric layer_rel_l2_metric() {
  Metric m;
  m.name = "layer_rel_l2";
  m.unit = "ratio";
  m.formula = "||W_O (o_sparse - o_dense)|| / ||W_O o_dense||, o = all heads joined";
  m.better = Better::down;
  m.scale = {HistogramScale::Kind::log, 1e-7, 10};
  m.per_query = true;
  m.available = [](const Comparison& c) { return c.wo.present(); };
  m.evaluate = [](const Comparison& c, float* out) {
    const auto n = static_cast<std::size_t>(c.queries);
    std::vector<double> error(n), dense;
    projected_norms(c.wo, c.heads, c.queries, c.head_dim, c.sparse_out, c.dense_out, error.data());
    const double* scale = c.dense_projected;
    if (!scale) {
      dense.resize(n);
      projected_norms(c.wo, c.heads, c.queries, c.head_dim, c.dense_out, nullptr, dense.data());
      scale = dense.data();
    }
    for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<float>(error[i] / scale[i]);
  };
  return m;
}

}  // namespace lacuna
