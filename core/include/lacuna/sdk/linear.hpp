// Small dense linear algebra in double: Gram matrices over the slots of a row, inverses of positive definite matrices,
// quadratic forms. Matrices are [rows, d, d]; every order of operations is fixed by the shape.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Workspace of one call of gram or of inverse, in one array.
inline i64 matrix_bytes(i64 rows, i64 d) { return rows * d * d * 8 + 256; }

/// out[row] = sum over the slots j < n of x(row, j) x(row, j)^T, plus `ridge` times the identity. X is a function
/// object x(row, j, e) with a LACUNA_HD call operator, as in row_sums.
template <class X>
double* gram(Context& c, i64 rows, i64 n, i64 d, double ridge, X x) {
  double* out = c.workspace<double>(rows * d * d);
  c.for_each(rows * d * d, [=] LACUNA_HD(i64 i) {
    const i64 row = i / (d * d), a = i / d % d, b = i % d;
    if (b > a) return;
    double sum = a == b ? ridge : 0.0;
    for (i64 j = 0; j < n; ++j) sum += x(row, j, a) * x(row, j, b);
    out[(row * d + a) * d + b] = sum;
    out[(row * d + b) * d + a] = sum;
  });
  c.charge(8.0 * rows * d * d, 1.0 * rows * n * d * d);
  return out;
}

/// The inverse of every positive definite matrix of a, by Cholesky; a becomes its lower factor.
inline double* inverse(Context& c, i64 rows, i64 d, double* a) {
  c.for_each(rows, [=] LACUNA_HD(i64 row) {
    double* l = a + row * d * d;
    for (i64 i = 0; i < d; ++i) {
      for (i64 j = 0; j <= i; ++j) {
        double sum = l[i * d + j];
        for (i64 k = 0; k < j; ++k) sum -= l[i * d + k] * l[j * d + k];
        l[i * d + j] = i == j ? sqrt(sum) : sum / l[j * d + j];
      }
    }
  });
  double* out = c.workspace<double>(rows * d * d);
  c.for_each(rows * d, [=] LACUNA_HD(i64 column) {
    const double* l = a + column / d * d * d;
    double* x = out + column / d * d * d + column % d;  // elements d apart
    for (i64 i = 0; i < d; ++i) {
      double sum = i == column % d ? 1.0 : 0.0;
      for (i64 k = 0; k < i; ++k) sum -= l[i * d + k] * x[k * d];
      x[i * d] = sum / l[i * d + i];
    }
    for (i64 i = d - 1; i >= 0; --i) {
      double sum = x[i * d];
      for (i64 k = i + 1; k < d; ++k) sum -= l[k * d + i] * x[k * d];
      x[i * d] = sum / l[i * d + i];
    }
  });
  c.charge(16.0 * rows * d * d, 3.0 * rows * d * d * d);
  return out;
}

/// One cached key or value as a function of its channel, for quadratic_form.
struct CachedVector {
  const void* data;  // Paged::k or Paged::v
  Dtype dtype;
  i64 at;  // its first element

  LACUNA_HD double operator()(i64 e) const { return load(data, dtype, at + e); }
};

/// x^T m x for a symmetric m [d, d]; x(e) is a function object or a lambda.
template <class X>
LACUNA_HD double quadratic_form(const double* m, i64 d, X x) {
  double sum = 0;
  for (i64 a = 0; a < d; ++a) {
    double dot = .5 * m[a * d + a] * x(a);
    for (i64 b = 0; b < a; ++b) dot += m[a * d + b] * x(b);
    sum += 2 * x(a) * dot;
  }
  return sum;
}

}  // namespace lacuna::sdk
