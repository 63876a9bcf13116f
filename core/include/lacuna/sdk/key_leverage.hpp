// Statistical leverage of the keys before RoPE: how much of a direction that few tokens use each key carries.
//
//   x_j      = key less the mean key; with a sketch of m columns, times a Gaussian [d, m] over sqrt(m), one per KV head
//   score(j) = x_j^T (sum x x^T + 0.01 I)^-1 x_j
#pragma once

#include "lacuna/sdk/linear.hpp"
#include "lacuna/sdk/reductions.hpp"

namespace lacuna::sdk {

/// Workspace of one call of key_leverage; `sketch` 0: none.
inline i64 key_leverage_bytes(i64 rows, i64 n, i64 d, i64 sketch) {
  const i64 projected = sketch ? rows * (n + d) * sketch * 4 + 2 * 256 : 0;
  return projected + row_sums_bytes(rows, n, d) + 2 * matrix_bytes(rows, sketch ? sketch : d) + rows * n * 4 + 256;
}

namespace detail {
/// Feature e of a slot, less its mean where there is one; 0 outside the inner slots.
struct KeyFeatures {
  const float* data;
  i64 n, width;
  const i32* length;
  Inner inner;
  const double* mean;

  LACUNA_HD double operator()(i64 row, i64 slot, i64 e) const {
    if (!inner.holds(slot, length[row])) return 0;
    const double x = data[(row * n + slot) * width + e];
    return mean ? x - mean[row * width + e] : x;
  }
};
/// KeyFeatures of one slot.
struct KeyFeaturesAt {
  KeyFeatures x;
  i64 row, slot;

  LACUNA_HD double operator()(i64 e) const { return x(row, slot, e); }
};
}  // namespace detail

/// Scores [kv.rows, kv.max_length] of the inner slots; 0 elsewhere.
inline float* key_leverage(Context& c, i64 sketch, Inner inner) {
  const Paged kv = c.kv();
  const i64 rows = kv.rows, n = kv.max_length, d = kv.head_dim, width = sketch ? sketch : d;
  const i32* length = kv.length;
  const float* keys = c.unrotated_keys();
  double* mean = row_sums(c, rows, n, d, detail::KeyFeatures{keys, n, d, length, inner, nullptr});
  c.for_each(rows * d, [=] LACUNA_HD(i64 i) {
    const i64 tokens = inner.count(length[i / d]);
    if (tokens > 0) mean[i] /= static_cast<double>(tokens);
  });
  detail::KeyFeatures x{keys, n, d, length, inner, mean};
  if (sketch) {
    const Random random = c.random();
    float* gaussian = c.workspace<float>(rows * d * sketch);
    c.for_each(rows * d * sketch, [=] LACUNA_HD(i64 i) {
      const i64 row = i / (d * sketch), at = i % (d * sketch);
      gaussian[i] = random.normal(static_cast<u64>(row), static_cast<u64>(at));
    });
    float* projected = c.workspace<float>(rows * n * sketch);
    const double scale = 1 / sqrt(static_cast<double>(sketch));
    const detail::KeyFeatures centred = x;
    c.for_each(rows * n * sketch, [=] LACUNA_HD(i64 i) {
      const i64 row = i / sketch / n, slot = i / sketch % n;
      double sum = 0;
      for (i64 e = 0; e < d; ++e) sum += centred(row, slot, e) * gaussian[(row * d + e) * sketch + i % sketch];
      projected[i] = static_cast<float>(sum * scale);
    });
    c.charge(8.0 * rows * n * sketch, 2.0 * rows * n * sketch * d);
    x = {projected, n, sketch, length, inner, nullptr};
  }
  const double* inverted = inverse(c, rows, width, gram(c, rows, n, width, .01, x));
  float* out = c.workspace<float>(rows * n);
  c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
    const i64 row = i / n, slot = i % n;
    if (!inner.holds(slot, length[row])) return;
    const double score = quadratic_form(inverted + row * width * width, width, detail::KeyFeaturesAt{x, row, slot});
    out[i] = score > 0 ? static_cast<float>(score) : 0.f;
  });
  c.charge(4.0 * rows * n * (2 * d + 1), 1.0 * rows * n * width * width);
  return out;
}

}  // namespace lacuna::sdk
