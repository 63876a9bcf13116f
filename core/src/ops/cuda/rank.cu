// Ranks of rows: a segmented radix sort of (order, index), a block a row, and one pass that writes each rank at the
// index that it came with. The sort is stable, so ties go to the lower index. As many rows at a time as the workspace
// holds.
#include "rank.cuh"

#include <algorithm>

#include "lacuna/ops/cuda_ops.hpp"
#include "order.cuh"
#include "segmented_sort.cuh"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr u32 kLast = ~0u;  // of what has no rank

// Ascending keys are descending values.
__global__ void keys_kernel(const float* values, i64 elements, i64 stride, const i32* n, u32* key, i32* index) {
  const i64 e = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (e >= elements || e % stride >= n[e / stride]) return;
  key[e] = ~key_of(values[e]);
  index[e] = static_cast<i32>(e % stride);
}

__global__ void ranks_kernel(const u32* key, const i32* index, i64 elements, i64 stride, const i32* n, float* values) {
  const i64 e = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (e >= elements) return;
  const i64 row = e / stride, rank = e % stride;
  if (rank >= n[row] || key[e] == kLast) return;
  float& value = values[row * stride + index[e]];
  if (isfinite(value)) value = 1.f - static_cast<float>(rank) / static_cast<float>(n[row]);
}

struct Begin {
  i32 stride;
  __host__ __device__ i32 operator()(i32 row) const { return row * stride; }
};
struct End {
  i32 stride;
  const i32* n;
  __device__ i32 operator()(i32 row) const { return row * stride + n[row]; }
};

}  // namespace

std::size_t rank_workspace_bytes(i64 rows, i64 stride) {
  return 4 * Carver::padded(static_cast<std::size_t>(rows * stride) * sizeof(u32)) + kSortBytes;
}

}  // namespace cuda

void CudaOps::rank_normalise(float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n) {
  using namespace cuda;
  const char* op = "rank_normalise";
  if (rows <= 0 || stride <= 0) return;
  if (stride > kMostSorted)
    throw Error({"the rows are too long to be ranked", "at most " + std::to_string(kMostSorted) + " values",
                 std::to_string(stride), op, ""});
  i64 at_once = std::min<i64>(rows, kMostSorted / stride);
  while (at_once > 1 && rank_workspace_bytes(at_once, stride) > workspace_bytes_) at_once = ceil_div<i64>(at_once, 2);
  Carver workspace(workspace_, workspace_bytes_, op);
  u32* key[2];
  i32* index[2];
  for (u32*& buffer : key) buffer = workspace.take<u32>(at_once * stride);
  for (i32*& buffer : index) buffer = workspace.take<i32>(at_once * stride);
  const cudaStream_t stream = stream_of(call_);
  unsigned char* own = workspace.take<unsigned char>(kSortBytes);
  for (i64 first = 0; first < rows; first += at_once) {
    const i64 count = std::min<i64>(at_once, rows - first), elements = count * stride;
    const i32 step = static_cast<i32>(stride);
    launch(op, stream, keys_kernel, ceil_div<i64>(elements, kThreads), kThreads, 0, values + first * stride, elements,
           stride, n + first, key[0], index[0]);
    cub::DoubleBuffer<u32> keys(key[0], key[1]);
    cub::DoubleBuffer<i32> indices(index[0], index[1]);
    sort_segments(op, keys, indices, elements, count, Begin{step}, End{step, n + first}, own, stream);
    launch(op, stream, ranks_kernel, ceil_div<i64>(elements, kThreads), kThreads, 0, keys.Current(), indices.Current(),
           elements, stride, n + first, values + first * stride);
  }
  cost_.bytes += 8. * rows * static_cast<double>(stride);
}

}  // namespace lacuna
