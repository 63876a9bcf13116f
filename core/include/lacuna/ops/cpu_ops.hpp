// The fused operations of the strategy interface on the CPU (fp32, OpenMP). See sdk::Ops and CoreOps for shapes and
// rules.
#pragma once

#include "lacuna/ops/core_ops.hpp"

namespace lacuna {

class CpuOps final : public CoreOps {
 public:
  /// `call` and `cost` must outlive the object; every operation adds its work to `cost`.
  CpuOps(const sdk::Call& call, Cost& cost) : call_(call), cost_(cost) {}
  sdk::i32 window_mass(const sdk::Queries& q, sdk::Reduce reduce, float* columns, float* diagonals, sdk::i64 stride,
                       sdk::Error*) noexcept override;
  sdk::i32 read_mass(const sdk::Attended& attended, float* columns, sdk::i64 stride, sdk::Error*) noexcept override;
  sdk::i32 group_reduce(const float* in, float* out, sdk::i64 n, sdk::i64 stride, sdk::Reduce reduce,
                        sdk::Error*) noexcept override;
  sdk::i32 pool(const float* in, float* out, sdk::i32 rows, const sdk::i32* count, sdk::i64 stride, sdk::i32 kernel,
                sdk::Reduce reduce, sdk::Error*) noexcept override;
  sdk::i32 topk(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const sdk::i32* k,
                sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride, sdk::Error*) noexcept override;
  sdk::i32 topp(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const sdk::i32* k, double p,
                sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride, sdk::Error*) noexcept override;
  sdk::i32 mean_keys(sdk::i32 block, sdk::i32 full_divisor, float* out, sdk::Error*) noexcept override;
  sdk::i32 mean_queries(const sdk::Queries& q, sdk::i32 tile, sdk::i32 full_divisor, float* out,
                        sdk::Error*) noexcept override;
  sdk::i32 antidiagonal_mass(const sdk::Queries& q, sdk::i32 stride, sdk::Scores& out, sdk::Error*) noexcept override;

  void unit_mass(const sdk::Queries& q, sdk::Scores& out) override;
  void top_mass(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const double* target,
                sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride) override;
  void rank_normalise(float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n) override;

 private:
  const sdk::Call& call_;
  Cost& cost_;
};

}  // namespace lacuna
