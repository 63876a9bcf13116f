// Sums over the slots of a row and what is made of them, in double and in an order that the shape alone decides, so
// that results do not depend on threads.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

namespace detail {
inline constexpr i64 kSumChunk = 256;  // slots that one thread adds up
inline i64 sum_chunks(i64 n) { return (n + kSumChunk - 1) / kSumChunk; }
}  // namespace detail

/// Workspace of one call of row_sums, in at most two arrays.
inline i64 row_sums_bytes(i64 rows, i64 n, i64 width) {
  return rows * (detail::sum_chunks(n) + 1) * width * 8 + 2 * 256;
}

/// out [rows, width] = sum over the slots j < n of x(row, j, e). X is a function object with a LACUNA_HD call operator
/// that gives 0 for slots that do not count.
template <class X>
double* row_sums(Context& c, i64 rows, i64 n, i64 width, X x) {
  const i64 chunks = detail::sum_chunks(n);
  double* partial = c.workspace<double>(rows * chunks * width);
  double* out = c.workspace<double>(rows * width);
  c.for_each(rows * chunks * width, [=] LACUNA_HD(i64 i) {
    const i64 row = i / width / chunks, begin = i / width % chunks * detail::kSumChunk, e = i % width;
    const i64 end = begin + detail::kSumChunk < n ? begin + detail::kSumChunk : n;
    double sum = 0;
    for (i64 j = begin; j < end; ++j) sum += x(row, j, e);
    partial[i] = sum;
  });
  c.for_each(rows * width, [=] LACUNA_HD(i64 i) {
    const i64 row = i / width, e = i % width;
    double sum = 0;
    for (i64 chunk = 0; chunk < chunks; ++chunk) sum += partial[(row * chunks + chunk) * width + e];
    out[i] = sum;
  });
  c.charge(0, 1.0 * rows * n * width);
  return out;
}

/// Workspace of one call of row_max, in two arrays.
inline i64 row_max_bytes(i64 rows, i64 n) { return row_sums_bytes(rows, n, 1); }

/// out [rows] = the largest x(row, j) over the slots j < n. X gives -inf for slots that do not count.
template <class X>
double* row_max(Context& c, i64 rows, i64 n, X x) {
  const i64 chunks = detail::sum_chunks(n);
  double* partial = c.workspace<double>(rows * chunks);
  double* out = c.workspace<double>(rows);
  c.for_each(rows * chunks, [=] LACUNA_HD(i64 i) {
    const i64 row = i / chunks, begin = i % chunks * detail::kSumChunk;
    const i64 end = begin + detail::kSumChunk < n ? begin + detail::kSumChunk : n;
    double most = -INFINITY;
    for (i64 j = begin; j < end; ++j) most = fmax(most, x(row, j));
    partial[i] = most;
  });
  c.for_each(rows, [=] LACUNA_HD(i64 row) {
    double most = -INFINITY;
    for (i64 chunk = 0; chunk < chunks; ++chunk) most = fmax(most, partial[row * chunks + chunk]);
    out[row] = most;
  });
  c.charge(0, 1.0 * rows * n);
  return out;
}

/// The slots of a row without the `first` first and the `last` last ones.
struct Inner {
  i64 first, last;

  LACUNA_HD bool holds(i64 slot, i64 length) const { return slot >= first && slot < length - last; }
  LACUNA_HD i64 count(i64 length) const { return length > first + last ? length - first - last : 0; }
};

namespace detail {
/// Sums of the values (mean null) or of their squared distances to the sequence's mean, over a row's inner slots.
struct Moment {
  const float* value;
  i64 n, heads, heads_kv;
  const i32* length;
  Inner inner;
  const double* mean;

  LACUNA_HD double operator()(i64 row, i64 slot, i64) const {
    const i64 kv_row = row / heads * heads_kv + row % heads / (heads / heads_kv);
    if (!inner.holds(slot, length[kv_row])) return 0;
    const double v = value[row * n + slot];
    return mean ? (v - mean[row / heads]) * (v - mean[row / heads]) : v;
  }
};
}  // namespace detail

/// Workspace of one call of standardise.
inline i64 standardise_bytes(i64 rows, i64 n, i64 seqs) {
  return 2 * row_sums_bytes(rows, n, 1) + 2 * (seqs * 8 + 256);
}

/// value [rows, n] becomes (value - mean) / standard deviation (unbiased) over the inner slots of all heads of a
/// sequence; where they are all equal, 0. `rows`: one tile.
inline void standardise(Context& c, const Rows& rows, i64 n, Inner inner, float* value) {
  const i64 heads = rows.heads, heads_kv = c.layer().num_kv_heads, count = rows.count();
  const i32* length = c.kv().length;
  double* mean = c.workspace<double>(rows.seqs);
  double* scale = c.workspace<double>(rows.seqs);
  const double* sum = row_sums(c, count, n, 1, detail::Moment{value, n, heads, heads_kv, length, inner, nullptr});
  c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
    double total = 0, tokens = 0;
    for (i64 h = 0; h < heads; ++h) {
      total += sum[seq * heads + h];
      tokens += static_cast<double>(inner.count(length[seq * heads_kv + h / (heads / heads_kv)]));
    }
    mean[seq] = tokens > 0 ? total / tokens : 0;
  });
  const double* squares = row_sums(c, count, n, 1, detail::Moment{value, n, heads, heads_kv, length, inner, mean});
  c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
    double total = 0, tokens = 0;
    for (i64 h = 0; h < heads; ++h) {
      total += squares[seq * heads + h];
      tokens += static_cast<double>(inner.count(length[seq * heads_kv + h / (heads / heads_kv)]));
    }
    scale[seq] = total > 0 && tokens > 1 ? 1 / sqrt(total / (tokens - 1)) : 0;
  });
  c.for_each(count * n, [=] LACUNA_HD(i64 i) {
    const i64 seq = i / n / heads;
    value[i] = static_cast<float>((value[i] - mean[seq]) * scale[seq]);
  });
  c.charge(8.0 * count * n, 2.0 * count * n);
}

}  // namespace lacuna::sdk
