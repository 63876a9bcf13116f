// Pooling along positions and reduction over GQA groups.
#include <algorithm>
#include <limits>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"

namespace lacuna {

using sdk::i32;
using sdk::i64;

i32 CpuOps::pool(const float* in, float* out, i32 rows, const i32* count, i64 stride, i32 kernel, sdk::Reduce reduce,
                 sdk::Error* error) noexcept {
  return guarded(error, [&] {
    if (kernel < 1) throw Error({"a pooling kernel is empty", "at least 1", std::to_string(kernel), "pool", ""});
    const i64 before = kernel / 2;
    double elements = 0;
    for (i32 r = 0; r < rows; ++r) elements += count[r];
#pragma omp parallel for schedule(static)
    for (i32 r = 0; r < rows; ++r) {
      const float* x = in + r * stride;
      for (i64 i = 0; i < count[r]; ++i) {
        const i64 begin = std::max<i64>(0, i - before), end = std::min<i64>(count[r], i - before + kernel);
        if (reduce == sdk::Reduce::max) {
          float most = -std::numeric_limits<float>::infinity();
          for (i64 j = begin; j < end; ++j) most = std::max(most, x[j]);
          out[r * stride + i] = most;
        } else {
          double sum = 0;
          for (i64 j = begin; j < end; ++j) sum += x[j];
          out[r * stride + i] = static_cast<float>(reduce == sdk::Reduce::mean ? sum / kernel : sum);
        }
      }
    }
    cost_.bytes += 8. * elements;
    cost_.flops += elements * kernel;
  });
}

i32 CpuOps::group_reduce(const float* in, float* out, i64 n, i64 stride, sdk::Reduce reduce,
                         sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const i64 group = call_.layer.group(), rows = static_cast<i64>(call_.num_seqs) * call_.layer.num_kv_heads;
#pragma omp parallel for schedule(static)
    for (i64 row = 0; row < rows; ++row)
      for (i64 i = 0; i < n; ++i) {
        const float* x = in + row * group * stride + i;
        double value = x[0];
        for (i64 g = 1; g < group; ++g)
          value = reduce == sdk::Reduce::max ? std::max<double>(value, x[g * stride]) : value + x[g * stride];
        out[row * stride + i] =
            static_cast<float>(reduce == sdk::Reduce::mean ? value / static_cast<double>(group) : value);
      }
    cost_.bytes += 4. * static_cast<double>(rows * n * (group + 1));
    cost_.flops += static_cast<double>(rows * n * group);
  });
}

}  // namespace lacuna
