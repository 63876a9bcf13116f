// Merges the parts of split keys: out = sum exp(lse_i - lse) out_i with lse = ln sum exp(lse_i), always in the order of
// the parts. A thread block a row: a thread a part for the weights, then a thread a channel.
#include "launch.hpp"

namespace lacuna::cuda::attention {
namespace {

constexpr int kThreads = static_cast<int>(kMostSplits);

__global__ __launch_bounds__(kThreads) void merge_kernel(const __grid_constant__ MergeJob job) {
  __shared__ float lse[kMostSplits], weight[kMostSplits];
  const i32 thread = static_cast<i32>(threadIdx.x);
  const i64 row = blockIdx.x;
  const i64 to = row / job.queries * job.out_queries + job.first_query + row % job.queries;
  if (thread < job.splits) lse[thread] = job.part_lse[thread * job.rows + row];
  __syncthreads();
  float top = -INFINITY, sum = 0.f;
  for (i32 n = 0; n < job.splits; ++n) top = fmaxf(top, lse[n]);
  const float base = top == -INFINITY ? 0.f : top;  // a difference of infinities is no number
  if (thread < job.splits) weight[thread] = exp2f((lse[thread] - base) * kLog2e);
  __syncthreads();
  for (i32 n = 0; n < job.splits; ++n) sum += weight[n];
  const float share = sum == 0.f ? 0.f : 1.f / sum;
  for (i32 c = thread; c < job.head_dim; c += kThreads) {
    float out = 0.f;
#pragma unroll 8
    for (i32 n = 0; n < job.splits; ++n)
      out = fmaf(weight[n], job.part_out[(n * job.rows + row) * job.head_dim + c], out);
    job.out[to * job.head_dim + c] = out * share;
  }
  if (thread == 0) job.lse[to] = sum == 0.f ? -INFINITY : base + logf(sum);
}

}  // namespace

void launch_merge(const MergeJob& job, cudaStream_t stream) {
  merge_kernel<<<static_cast<unsigned>(job.rows), kThreads, 0, stream>>>(job);
  check_launch("merge of split keys");
}

}  // namespace lacuna::cuda::attention
