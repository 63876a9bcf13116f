// Direction of a head's output. A query that read nothing has no direction and counts as 0, so that emptying the worst
// queries is not rewarded; undefined where the dense output is zero.
#include "vectors.hpp"

namespace lacuna {

Metric output_cosine_metric() {
  Metric m;
  m.name = "output_cosine";
  m.unit = "cosine";
  m.formula = "<o_sparse, o_dense> / (||o_sparse|| ||o_dense||)";
  m.better = Better::up;
  m.scale = {HistogramScale::Kind::linear, 0, 1};
  m.evaluate = [](const Comparison& c, float* out) {
    for_each_sample(c, [&](sdk::i64 i, sdk::i64 row) {
      const float *sparse = c.sparse_out + row, *dense = c.dense_out + row;
      const double sparse_norm = norm(sparse, c.head_dim), dense_norm = norm(dense, c.head_dim);
      const double product = sparse_norm > 0 ? dot(sparse, dense, c.head_dim) / sparse_norm : 0;
      out[i] = static_cast<float>(product / dense_norm);
    });
  };
  return m;
}

}  // namespace lacuna
