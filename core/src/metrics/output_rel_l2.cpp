// Relative error of a head's output. 1 for a query that read nothing; undefined where the dense output is zero.
#include "vectors.hpp"

namespace lacuna {

Metric output_rel_l2_metric() {
  Metric m;
  m.name = "output_rel_l2";
  m.unit = "ratio";
  m.formula = "||o_sparse - o_dense|| / ||o_dense||";
  m.better = Better::down;
  m.scale = {HistogramScale::Kind::log, 1e-7, 10};
  m.evaluate = [](const Comparison& c, float* out) {
    for_each_sample(c, [&](sdk::i64 i, sdk::i64 row) {
      const double error = distance(c.sparse_out + row, 1, c.dense_out + row, c.head_dim);
      out[i] = static_cast<float>(error / norm(c.dense_out + row, c.head_dim));
    });
  };
  return m;
}

}  // namespace lacuna
