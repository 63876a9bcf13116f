// What is measured: each metric compares a sparse result with the dense one, sample by sample. One file a metric in
// src/metrics/, listed in src/metrics/list.def; formulas and their reading in docs/metrics.md.
#pragma once

#include <string>
#include <vector>

#include "lacuna/sdk/types.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// Which way a metric improves; p1 and the worst head lie on the other side.
enum class Better { up, down };

/// The fixed bins of a metric's histograms, equal in every row ever stored, so that they merge. Values outside [lo, hi)
/// fall into the first or last bin.
struct HistogramScale {
  enum class Kind { linear, log } kind = Kind::linear;
  double lo = 0, hi = 1;
  static constexpr int kBins = 64;

  int bin(double value) const;   // of a value that is not NaN
  double edge(int index) const;  // lower edge of bin `index`; edge(kBins) == hi
};

/// One layer of one sequence in one phase, host memory, fp32 unless said. out [heads, queries, head_dim], lse and mass
/// [heads, queries], heads are query heads. A query that read nothing has sparse_lse -inf and a zero sparse_out.
struct Comparison {
  sdk::i32 heads = 0, head_dim = 0;
  sdk::i64 queries = 0;
  const float *dense_out = nullptr, *dense_lse = nullptr;
  const float *sparse_out = nullptr, *sparse_lse = nullptr;
  const double* mass_kept = nullptr;      // dense probability over the set that was read
  const float* unweighted_out = nullptr;  // the same set read without log weights; null: sparse_out is that
  Tensor wo;                              // [d_model, heads * head_dim], or absent
  const double* dense_projected =
      nullptr;                     // [queries] of projected_norms(dense_out), to share it between methods; or null
  const double* regret = nullptr;  // see matched_oracle.hpp; or null
};

/// Samples of one metric, [rows, queries]: a row per query head, or a single one (`per_query`).
/// NaN or infinite: undefined there.
struct Samples {
  sdk::i32 rows = 0;
  sdk::i64 queries = 0;
  std::vector<float> value;
};

struct Metric {
  std::string name, unit, formula;
  Better better = Better::up;
  HistogramScale scale;
  bool per_query = false;                          // heads together: one row of samples, shown as head -1
  bool (*available)(const Comparison&) = nullptr;  // null: always
  /// Fills out [rows, queries]; arithmetic in double. Deterministic for any thread count.
  void (*evaluate)(const Comparison&, float* out) = nullptr;
};

/// Every metric, in the order of tables.
const std::vector<Metric>& metrics();
/// Throws Error with the nearest names.
const Metric& find_metric(const std::string& name);
/// Empty (rows 0) when the comparison lacks what the metric needs.
Samples evaluate(const Metric& metric, const Comparison& comparison);

/// norms[i] = || wo x_i ||, x_i the heads' rows of query i joined: x [heads, queries, head_dim], and minus [the same]
/// (or null) is subtracted from x first. Products fp32, norms fp64.
void projected_norms(const Tensor& wo, sdk::i32 heads, sdk::i64 queries, sdk::i32 head_dim, const float* x,
                     const float* minus, double* norms);

}  // namespace lacuna
