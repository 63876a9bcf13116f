// Softmax mass of some queries by key (the units pass, with units of one slot) and by distance.
#include <algorithm>

#include "lacuna/ops/cuda_ops.hpp"
#include "mass.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

// Sixteen queries at consecutive positions meet kDiagonals distances in at most kKeys keys.
constexpr int kDiagonals = kKeys - kStrip + 1;
constexpr int kCellPitch = kKeys + 1;

template <Dtype kType>
std::size_t diagonal_bytes(const Mass& m) {
  return Tile<kType>::bytes(m.depth) + m.group * kDiagonals * sizeof(double) +
         kWarps * kStrip * kCellPitch * sizeof(float) + kKeys * sizeof(int);
}

// A block owns the distances [offset, offset + kDiagonals) of a KV row's heads, and goes through the strips of queries
// in order; each warp takes some of the heads, each lane some of the distances.
template <Dtype kType, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    diagonal_kernel(Mass m, i64 ranges, i64 stride, double divisor, float* out, Combine combine) {
  extern __shared__ uint4 shared[];
  const Tile<kType> tile(shared, m.depth);
  double* sum = reinterpret_cast<double*>(tile.rest);  // [group, kDiagonals]
  float* cells = reinterpret_cast<float*>(sum + m.group * kDiagonals) + warp_id() * kStrip * kCellPitch;
  int* key_at =
      reinterpret_cast<int*>(reinterpret_cast<float*>(sum + m.group * kDiagonals) + kWarps * kStrip * kCellPitch);
  const i64 kv_row = blockIdx.x / ranges, offset = blockIdx.x % ranges * kDiagonals;
  const i32* seen = m.seen + kv_row * m.positions;  // by position: the table begins at 0
  for (int n = static_cast<int>(threadIdx.x); n < m.group * kDiagonals; n += kThreads) sum[n] = 0;

  for (i64 first = 0; first < m.count; first += kStrip) {
    const int count = static_cast<int>(min(static_cast<i64>(kStrip), m.count - first));
    const i64 position = m.q.first_position + m.begin + first;
    const i64 lowest = position - offset - (kDiagonals - 1), highest = position + count - 1 - offset;
    if (highest < 0) continue;
    const i32 begin = lowest > 0 ? seen[lowest - 1] : 0, end = seen[highest];
    if (begin == end) continue;
    tile.load_keys(m.kv, m.keys, kv_row, [&](int j) { return begin + j < end ? static_cast<i64>(begin + j) : -1; });
    if (threadIdx.x < kKeys) key_at[threadIdx.x] = -1;
    __syncthreads();
    if (const int j = static_cast<int>(threadIdx.x); j < end - begin)
      key_at[m.kv.position_of(kv_row, begin + j) - lowest] = j;
    __syncthreads();
    for (int h = warp_id(); h < m.group; h += kWarps) {
      const Strip strip{kv_row * m.group + h, first, count};
      strip.load(tile, m);
      double lse[2];
      i32 slot[2];
      strip.slots(m, kv_row, slot);
      for (int half = 0; half < 2; ++half)
        lse[half] = slot[half] >= 0 ? m.lse[strip.head * m.count + first + query_index(half)] : INFINITY;
      const float* norm = m.key_norm + kv_row * m.key_blocks();
      const bool wide = is_wide(strip.norm(m), larger_norm(norm[begin / kKeys], norm[(end - 1) / kKeys]));
      with_products(tile, wide, [&](auto& x) {
        for_each_probability(
            x, m.scale, lse, [&](int half, int key) { return begin + key <= slot[half] ? 0.f : -INFINITY; },
            [&](int half, int n, int c, float p) { cells[query_index(half) * kCellPitch + key_index(n, c)] = p; });
      });
      __syncwarp();
      for (int d = lane_id(); d < kDiagonals; d += 32) {
        double total = sum[h * kDiagonals + d];
        for (int i = 0; i < count; ++i)
          if (const int key = key_at[i - d + kDiagonals - 1]; key >= 0)
            total = combine(total, static_cast<double>(cells[i * kCellPitch + key]));
        sum[h * kDiagonals + d] = total;
      }
      __syncwarp();
    }
  }
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < m.group * kDiagonals; n += kThreads)
    if (const i64 d = offset + n % kDiagonals; d < stride)
      out[(kv_row * m.group + n / kDiagonals) * stride + d] = static_cast<float>(sum[n] / divisor);
}

void sum_diagonals(const Mass& m, bool maximum, double divisor, float* out, i64 stride, cudaStream_t stream) {
  const i64 ranges = ceil_div<i64>(std::min(stride, m.positions), kDiagonals);
  with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    const auto run = [&](auto kernel, auto combine) {
      launch("window_mass", stream, kernel, m.kv.rows * ranges, kThreads, diagonal_bytes<kType>(m), m, ranges, stride,
             divisor, out, combine);
    };
    if (maximum)
      run(diagonal_kernel<kType, Most>, Most{});
    else
      run(diagonal_kernel<kType, Add>, Add{});
  });
}

}  // namespace
}  // namespace cuda

sdk::i32 CudaOps::window_mass(const sdk::Queries& q, sdk::Reduce reduce, float* columns, float* diagonals,
                              sdk::i64 stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const char* op = "window_mass";
    const cudaStream_t stream = cuda::stream_of(call_);
    const sdk::i64 rows = static_cast<sdk::i64>(q.seqs) * q.heads;
    const std::size_t bytes = static_cast<std::size_t>(rows * stride) * sizeof(float);
    cuda::check(cudaMemsetAsync(columns, 0, bytes, stream), op);
    if (diagonals) cuda::check(cudaMemsetAsync(diagonals, 0, bytes, stream), op);
    if (q.count == 0 || call_.kv.max_length == 0) return;

    cuda::Carver workspace(workspace_, workspace_bytes_, op);
    cuda::Mass m = cuda::prepare_mass(call_, q, 0, q.count, diagonals ? 0 : q.first_position, workspace, op);
    cuda::find_lse(m, workspace, stream, op);
    const bool maximum = reduce == sdk::Reduce::max;
    const double divisor = reduce == sdk::Reduce::mean ? static_cast<double>(q.count) : 1.;
    const sdk::Rows all{q.seqs, q.heads, 0, 1, static_cast<sdk::i32>(q.count), 1, q.count, q.first_position};
    cuda::sum_units(m, {all, columns, stride, std::min<sdk::i64>(stride, call_.kv.max_length), 1, divisor}, maximum,
                    stream, op);
    if (diagonals) cuda::sum_diagonals(m, maximum, divisor, diagonals, stride, stream);

    const double passes = diagonals ? 3 : 2;
    cost_.flops += passes * 2. * cuda::pairs_at_most(m) * q.head_dim;
    cost_.bytes += passes * (cuda::key_bytes_at_most(call_.kv) + cuda::query_bytes(q)) +
                   (diagonals ? 2. : 1.) * 4. * static_cast<double>(rows * stride);
  });
}

}  // namespace lacuna
