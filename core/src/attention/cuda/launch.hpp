// The kernels behind attend_cuda. Every launcher enqueues on the stream and throws Error if the launch fails.
#pragma once

#include <cuda_runtime.h>

#include "reading.cuh"

namespace lacuna::cuda::attention {

using OwnerKey = unsigned long long;  // as CUDA's atomics spell 64 bits

/// Where launch_lists writes; `owner` [rows, stride] is scratch, given iff weight is.
struct ListOutput {
  i32* slot;
  float* weight;
  OwnerKey* owner;
  i32* count;
  i64 stride;
};

/// Lists of rows [row_begin, row_begin + rows) of the selection.
void launch_lists(const Attention& a, i64 row_begin, i64 rows, const ListOutput& out, cudaStream_t stream);

/// blocks = rows of the launch * tiles_per_row * splits. tile_rows: 16, 64 or, up to this head size, 128: larger ones
/// would not fit the shared memory of sm_80.
constexpr i32 kWideHeadDim = 128;
template <int kHeadDim>
void launch_tensor(const Job& job, i64 blocks, cudaStream_t stream);

constexpr i32 kGenericTileRows = 4;
constexpr i32 kGenericMostHeadDim = 1024;
void launch_generic(const Job& job, i64 blocks, cudaStream_t stream);

constexpr i64 kMostSplits = 128;

/// Merges `splits` <= kMostSplits parts of [rows, head_dim] and [rows] results, in their order. Query i of `queries`
/// goes to row first_query + i of out_queries.
struct MergeJob {
  const float *part_out, *part_lse;
  i32 splits, head_dim;
  i64 rows, queries, first_query, out_queries;
  float *out, *lse;
};
void launch_merge(const MergeJob& job, cudaStream_t stream);

/// Throws Error for what the last launch left.
void check_launch(const char* kernel);

}  // namespace lacuna::cuda::attention
