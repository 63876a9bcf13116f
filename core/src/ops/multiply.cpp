// Register tiles of R rows by V vectors of lanes: each step loads V vectors of b and broadcasts R elements of a. No sum
// runs across a vector, so a lane's result does not depend on its neighbours or on the number of lanes.
#include "lacuna/ops/multiply.hpp"

#include <cmath>
#include <cstring>

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;
using simd::Isa;

template <class T, int kWidth, int V, int R>
LACUNA_INLINE void register_tile(const T* a, i64 row_stride, i64 step_stride, int depth, const T* b, int lanes, T* c,
                                 const T* keep) {
  using Vec = simd::Vector<T, kWidth>;
  Vec sum[R][V] = {};
  for (int t = 0; t < depth; ++t) {
    Vec x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = simd::vector_at<const Vec>(b + static_cast<i64>(t) * lanes + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T y = a[r * row_stride + t * step_stride];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += y * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec& out = simd::vector_at<Vec>(c + static_cast<i64>(r) * lanes + v * kWidth);
      out = keep ? simd::vector_at<const Vec>(keep + v * kWidth) * out + sum[r][v] : sum[r][v];
    }
}

// Lanes [0, lanes) in tiles of V vectors, as far as they go; returns the lanes done.
template <class T, int kWidth, int V, int R>
LACUNA_INLINE int lane_tiles(const T* a, i64 row_stride, i64 step_stride, int rows, int depth, const T* b, int lanes,
                             int done, T* c, const T* keep) {
  constexpr int kLanes = V * kWidth;
  for (; done + kLanes <= lanes; done += kLanes)
    for (int r = 0; r < rows; r += R)
      register_tile<T, kWidth, V, R>(a + r * row_stride, row_stride, step_stride, depth, b + done, lanes,
                                     c + static_cast<i64>(r) * lanes + done, keep ? keep + done : nullptr);
  return done;
}

// kWidth stored elements as fp32.
template <int kWidth>
LACUNA_INLINE void widen_bf16(const sdk::u16* p, float* out) {
  using Word = simd::Vector<sdk::u32, kWidth>;
  const auto& half = simd::vector_at<const simd::Unaligned<sdk::u16, kWidth>>(p);
  simd::vector_at<simd::Unaligned<sdk::u32, kWidth>>(out) = __builtin_convertvector(half, Word) << 16;
}
template <int kWidth>
LACUNA_INLINE void widen_f16(const sdk::u16* p, float* out) {
  using Word = simd::Vector<sdk::u32, kWidth>;
  using Real = simd::Vector<float, kWidth>;
  const Word h = __builtin_convertvector(simd::vector_at<const simd::Unaligned<sdk::u16, kWidth>>(p), Word);
  const Word magnitude = (h & 0x7fffu) << 13;
  // The exponent is re-biased by a multiplication, which also makes subnormals right.
  const Real scaled = reinterpret_cast<const Real&>(magnitude) * 0x1p112f;
  const Word special = static_cast<Word>(magnitude >= 0x0f800000u) & 0x7f800000u;
  simd::vector_at<simd::Unaligned<sdk::u32, kWidth>>(out) =
      reinterpret_cast<const Word&>(scaled) | special | ((h & 0x8000u) << 16);
}

template <int kWidth>
LACUNA_INLINE void convert(const void* data, sdk::Dtype dtype, i64 begin, int n, float* out) {
  int i = 0;
  if (dtype == sdk::Dtype::bf16) {
    for (const auto* p = static_cast<const sdk::u16*>(data) + begin; i + kWidth <= n; i += kWidth)
      widen_bf16<kWidth>(p + i, out + i);
  } else if (dtype == sdk::Dtype::f16) {
    for (const auto* p = static_cast<const sdk::u16*>(data) + begin; i + kWidth <= n; i += kWidth)
      widen_f16<kWidth>(p + i, out + i);
  } else if (dtype == sdk::Dtype::f32) {
    std::memcpy(out, static_cast<const float*>(data) + begin, static_cast<std::size_t>(n) * sizeof(float));
    i = n;
  }
  for (; i < n; ++i) out[i] = sdk::load(data, dtype, begin + i);
}

// Sum of squares of n elements, n a multiple of 8.
LACUNA_INLINE float squares(const float* x, int n) {
  using Vec = simd::Vector<float, 4>;
  Vec sum = {};
  for (int i = 0; i < n; i += 4) {
    const Vec v = simd::vector_at<const simd::Unaligned<float, 4>>(x + i);
    sum += v * v;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

template <class T>
void multiply(const T* a, i64 row_stride, i64 step_stride, int rows, int depth, const T* b, int lanes, T* c,
              const T* keep) {
  simd::multiversion([&](auto isa) LACUNA_INLINE_LAMBDA {
    constexpr Isa kIsa = decltype(isa)::value;
    constexpr int kWidth = simd::register_bytes(kIsa) / static_cast<int>(sizeof(T));
    constexpr int kOne = kLaneStep / kWidth;  // registers of one lane step
    int done = 0;
    if constexpr (kIsa == Isa::avx512) {
      done =
          lane_tiles<T, kWidth, 4 * kOne, 4 / kOne>(a, row_stride, step_stride, rows, depth, b, lanes, done, c, keep);
      lane_tiles<T, kWidth, kOne, 8 / kOne>(a, row_stride, step_stride, rows, depth, b, lanes, done, c, keep);
    } else {
      lane_tiles<T, kWidth, 2, 4>(a, row_stride, step_stride, rows, depth, b, lanes, done, c, keep);
    }
  });
}
template void multiply<float>(const float*, i64, i64, int, int, const float*, int, float*, const float*);
template void multiply<double>(const double*, i64, i64, int, int, const double*, int, double*, const double*);

void convert_row(const void* data, sdk::Dtype dtype, i64 begin, int n, float* out) {
  simd::multiversion([&](auto isa) LACUNA_INLINE_LAMBDA {
    convert<simd::register_bytes(decltype(isa)::value) / 4>(data, dtype, begin, n, out);
  });
}

double convert_rows(const void* data, sdk::Dtype dtype, const i64* begin, int rows, int n, float* out, int out_stride) {
  float largest = 0.f;
  simd::multiversion([&](auto isa) LACUNA_INLINE_LAMBDA {
    for (int r = 0; r < rows; ++r) {
      float* row = out + static_cast<i64>(r) * out_stride;
      convert<simd::register_bytes(decltype(isa)::value) / 4>(data, dtype, begin[r], n, row);
      std::memset(row + n, 0, static_cast<std::size_t>(out_stride - n) * sizeof(float));
      const float sum = squares(row, out_stride);
      if (!(sum <= largest)) largest = sum;
    }
  });
  return std::sqrt(static_cast<double>(largest));
}

}  // namespace lacuna
