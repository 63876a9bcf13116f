// Norms and products of one (head, query) row, in fp64.
#pragma once

#include <cmath>

#include "lacuna/metrics/metric.hpp"

namespace lacuna {

/// f(index of the sample, offset of its output row) for every (head, query).
template <class F>
void for_each_sample(const Comparison& c, F f) {
  const sdk::i64 n = c.heads * c.queries;
#pragma omp parallel for schedule(static) if (n >= 2048)
  for (sdk::i64 i = 0; i < n; ++i) f(i, i * c.head_dim);
}

inline double dot(const float* a, const float* b, sdk::i32 n) {
  double sum = 0;
  for (sdk::i32 c = 0; c < n; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

inline double norm(const float* a, sdk::i32 n) { return std::sqrt(dot(a, a, n)); }

/// || scale * a - b ||
inline double distance(const float* a, double scale, const float* b, sdk::i32 n) {
  double sum = 0;
  for (sdk::i32 c = 0; c < n; ++c) {
    const double difference = scale * a[c] - b[c];
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

}  // namespace lacuna
