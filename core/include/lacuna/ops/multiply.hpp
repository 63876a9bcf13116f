// The one matrix product behind the CPU kernels, and the conversion of stored rows to fp32.
#pragma once

#include "lacuna/ops/simd.hpp"

namespace lacuna {

/// Rows of `a` and channels are padded to this many.
inline constexpr int kRowStep = 8;
/// Lanes (columns of `b` and `c`) come in multiples of this many.
inline constexpr int kLaneStep = 16;

template <class T>
constexpr T round_up(T n, T step) {
  return (n + step - 1) / step * step;
}

/// c[r * lanes + l] = (keep ? keep[l] * c : 0) + sum over t < depth of a[r * row_stride + t * step_stride] * b[t *
/// lanes + l], for r < rows, l < lanes; rows a multiple of kRowStep, lanes of kLaneStep, b and c 64-byte aligned. T:
/// float or double.
template <class T>
void multiply(const T* a, sdk::i64 row_stride, sdk::i64 step_stride, int rows, int depth, const T* b, int lanes, T* c,
              const T* keep);

/// n elements of a stored array, from element `begin`, as fp32.
void convert_row(const void* data, sdk::Dtype dtype, sdk::i64 begin, int n, float* out);

/// Rows begin[i] .. begin[i] + n of a stored array into out + i * out_stride, zeros in the rest of the stride; returns
/// the largest Euclidean norm of a row (infinite where the squares overflow).
double convert_rows(const void* data, sdk::Dtype dtype, const sdk::i64* begin, int rows, int n, float* out,
                    int out_stride);

}  // namespace lacuna
