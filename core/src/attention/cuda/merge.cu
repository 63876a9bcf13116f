// Merges the parts of split keys: out = sum exp(lse_i - lse) out_i with lse = ln sum exp(lse_i), always in the order of
// the parts. A thread block a row, a thread a channel.
#include "launch.hpp"

namespace lacuna::cuda {
namespace {

constexpr int kThreads = 128;

__global__ __launch_bounds__(kThreads) void merge_kernel(const __grid_constant__ MergeJob job) {
  const i64 row = blockIdx.x;
  const i64 to = row / job.queries * job.out_queries + job.first_query + row % job.queries;
  float top = -INFINITY;
  for (i32 n = 0; n < job.splits; ++n) top = fmaxf(top, job.part_lse[n * job.rows + row]);
  const float base = top == -INFINITY ? 0.f : top;
  for (i32 c = static_cast<i32>(threadIdx.x); c < job.head_dim; c += kThreads) {
    float sum = 0.f, out = 0.f;
#pragma unroll 8
    for (i32 n = 0; n < job.splits; ++n) {
      const i64 from = n * job.rows + row;
      const float weight = exp2f((job.part_lse[from] - base) * kLog2e);
      sum += weight;
      out = fmaf(weight, job.part_out[from * job.head_dim + c], out);
    }
    job.out[to * job.head_dim + c] = sum == 0.f ? 0.f : out / sum;
    if (c == 0) job.lse[to] = sum == 0.f ? -INFINITY : base + logf(sum);
  }
}

}  // namespace

void launch_merge(const MergeJob& job, cudaStream_t stream) {
  merge_kernel<<<static_cast<unsigned>(job.rows), kThreads, 0, stream>>>(job);
  check_launch("merge of split keys");
}

}  // namespace lacuna::cuda
