#include <cmath>

#include "lacuna/base/error.hpp"
#include "lacuna/metrics/metric.hpp"
#include "lacuna/ops/multiply.hpp"

namespace lacuna {

using sdk::i32;
using sdk::i64;

void projected_norms(const Tensor& wo, i32 heads, i64 queries, i32 head_dim, const float* x, const float* minus,
                     double* norms) {
  const i64 width = static_cast<i64>(heads) * head_dim;
  if (wo.shape.size() != 2 || wo.shape[1] != width) {
    throw Error(Problem{
        "W_O does not fit the heads", "shape [d_model, " + std::to_string(width) + "]",
        wo.shape.size() == 2 ? "width " + std::to_string(wo.shape[1]) : std::to_string(wo.shape.size()) + " dimensions",
        "metric layer_rel_l2", ""});
  }
  constexpr int kRows = 64, kLanes = 64;  // of W_O and queries at a time
  const i64 rows = wo.shape[0], padded = round_up<i64>(rows, kRowStep);
  simd::Aligned<float> weight(static_cast<std::size_t>(padded * width));  // padding rows stay 0
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < rows; ++r)
    convert_row(wo.data, wo.dtype, r * width, static_cast<int>(width), weight.data() + r * width);

#pragma omp parallel
  {
    simd::Aligned<float> joined(static_cast<std::size_t>(width * kLanes)), product(kRows * kLanes);
#pragma omp for schedule(static)
    for (i64 begin = 0; begin < queries; begin += kLanes) {
      const i64 n = std::min<i64>(kLanes, queries - begin);
      for (i64 l = 0; l < n; ++l) {
        for (i64 c = 0; c < width; ++c) {
          const i64 at = (c / head_dim * queries + begin + l) * head_dim + c % head_dim;
          joined[static_cast<std::size_t>(c * kLanes + l)] = minus ? x[at] - minus[at] : x[at];
        }
      }
      double squares[kLanes] = {};
      for (i64 r = 0; r < padded; r += kRows) {
        const int some = static_cast<int>(std::min<i64>(kRows, padded - r));
        multiply<float>(weight.data() + r * width, width, 1, some, static_cast<int>(width), joined.data(), kLanes,
                        product.data(), nullptr);
        for (int i = 0; i < some * kLanes; ++i) {
          const double y = product[static_cast<std::size_t>(i)];
          squares[i % kLanes] += y * y;
        }
      }
      for (i64 l = 0; l < n; ++l) norms[begin + l] = std::sqrt(squares[l]);
    }
  }
}

}  // namespace lacuna
