// The fused operations of the strategy interface on a GPU. See sdk::Ops and CoreOps for shapes and rules.
#pragma once

#include <cstddef>

#include "lacuna/ops/core_ops.hpp"

namespace lacuna {

/// Every pointer of a call, of the cache and of the arguments is device memory; work is ordered on Call::stream of the
/// current device, nothing is allocated and nothing synchronises, so a call can be captured in a CUDA graph (which then
/// holds the call's and the workspace's addresses). Equal inputs give equal bits: no sum depends on scheduling.
/// Probabilities agree with CpuOps within 1e-4 of themselves: 16-bit queries and keys of one type are multiplied on the
/// tensor cores, exact products summed in fp32, and in fp64 where their norms allow a logit above 64; any other mix of
/// types is summed in fp64 throughout. topk and rank_normalise give what CpuOps gives; topp and top_mass too but for
/// sums that differ from the threshold by less than rounding, and their rows have at most 2^20 values. Head sizes up to
/// 256.
/// Costs are upper bounds, since lengths and counts are not read back: every row counts as the longest one, every row
/// of values as full.
class CudaOps final : public CoreOps {
 public:
  /// `call` and `cost` must outlive the object; the workspace is device memory, 256-byte aligned, overwritten by every
  /// operation. One that needs more than there is fails with the two sizes, before anything runs.
  CudaOps(const sdk::Call& call, Cost& cost, void* workspace, std::size_t bytes)
      : call_(call), cost_(cost), workspace_(workspace), workspace_bytes_(bytes) {}
  /// Bytes that suffice for every operation on `seqs` sequences of at most `max_tokens` tokens, cached or evicted
  /// (positions count), with at most `max_queries` queries a call. Grows with both: about 12 bytes a query of a query
  /// head, 4 a position of a KV head, and up to 64 MiB (more if one tile of rows needs it) for read_mass or, where this
  /// is more, 16 bytes a token of a query head for rank_normalise, which takes larger arrays by ranges of rows.
  static std::size_t workspace_bytes(const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens, sdk::i64 max_queries);

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
  void* workspace_;
  std::size_t workspace_bytes_;
};

}  // namespace lacuna
