// Softmax of long rows, in parts so that a row is not one thread's.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

inline constexpr i64 kSoftmaxParts = 128;  // of a row

/// Workspace of softmax_rows(), slack included.
inline i64 softmax_bytes(i64 rows) { return 2 * (8 * rows * kSoftmaxParts + 256); }

/// Softmax of the first n values of each row, in place; -inf (no candidate) stays -inf.
inline void softmax_rows(Context& c, float* value, i64 rows, i64 stride, i64 n) {
  double *peak = c.workspace<double>(rows * kSoftmaxParts), *sum = c.workspace<double>(rows * kSoftmaxParts);
  c.for_each(rows * kSoftmaxParts, [=] LACUNA_HD(i64 i) {
    const float* of_row = value + i / kSoftmaxParts * stride;
    double most = -INFINITY, total = 0;
    for (i64 j = i % kSoftmaxParts; j < n; j += kSoftmaxParts) most = of_row[j] > most ? of_row[j] : most;
    for (i64 j = i % kSoftmaxParts; j < n; j += kSoftmaxParts)
      if (of_row[j] > -INFINITY) total += exp(of_row[j] - most);
    peak[i] = most;
    sum[i] = total;
  });
  c.for_each(rows, [=] LACUNA_HD(i64 row) {
    double *peaks = peak + row * kSoftmaxParts, *sums = sum + row * kSoftmaxParts;
    double most = -INFINITY, total = 0;
    for (i64 p = 0; p < kSoftmaxParts; ++p) most = peaks[p] > most ? peaks[p] : most;
    for (i64 p = 0; p < kSoftmaxParts; ++p)
      if (peaks[p] > -INFINITY) total += sums[p] * exp(peaks[p] - most);
    peaks[0] = most;
    sums[0] = total;
  });
  c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
    const i64 row = i / n;
    float& x = value[row * stride + i % n];
    if (x > -INFINITY) x = static_cast<float>(exp(x - peak[row * kSoftmaxParts]) / sum[row * kSoftmaxParts]);
  });
  c.charge(8.0 * static_cast<double>(rows) * static_cast<double>(n), 4.0 * static_cast<double>(rows * n));
}

}  // namespace lacuna::sdk
