// What the dropped tokens would have added to the output. With o_kept the output over the kept set alone (no log
// weights), sum over dropped p v = o_dense - mass_kept * o_kept, so no second pass over the keys is needed.
#include "vectors.hpp"

namespace lacuna {

Metric tail_value_bias_metric() {
  Metric m;
  m.name = "tail_value_bias";
  m.unit = "ratio";
  m.formula = "||sum over dropped j of p_qj v_j|| / ||o_dense||";
  m.better = Better::down;
  m.scale = {HistogramScale::Kind::log, 1e-7, 10};
  m.evaluate = [](const Comparison& c, float* out) {
    const float* kept = c.unweighted_out ? c.unweighted_out : c.sparse_out;
    for_each_sample(c, [&](sdk::i64 i, sdk::i64 row) {
      const double dropped = distance(kept + row, c.mass_kept[i], c.dense_out + row, c.head_dim);
      out[i] = static_cast<float>(dropped / norm(c.dense_out + row, c.head_dim));
    });
  };
  return m;
}

}  // namespace lacuna
