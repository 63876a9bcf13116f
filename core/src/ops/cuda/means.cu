// Mean keys of blocks and mean queries of tiles: a channel a thread, summed in fp64 in the CPU's order, so with its
// bits.
#include "lacuna/ops/cuda_ops.hpp"
#include "launch.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// Mean of n rows of d elements, row i at element at(i), over `divisor`; by a block.
template <sdk::Dtype kType, class At>
__device__ void mean_row(const void* data, i64 n, i32 d, i64 divisor, At at, float* out) {
  for (i32 c = static_cast<i32>(threadIdx.x); c < d; c += kThreads) {
    double sum = 0;
#pragma unroll 16
    for (i64 i = 0; i < n; ++i) sum += sdk::load(data, kType, at(i) + c);
    out[c] = n > 0 ? static_cast<float>(sum / static_cast<double>(divisor)) : 0.f;
  }
}

template <sdk::Dtype kType>
__global__ void mean_keys_kernel(sdk::Paged kv, i32 block, bool full_divisor, i64 blocks, float* out) {
  const i64 row = blockIdx.x / blocks, begin = blockIdx.x % blocks * block;
  const i64 n = max(i64{0}, min(kv.length[row] - begin, static_cast<i64>(block)));
  mean_row<kType>(
      kv.k, n, kv.head_dim, full_divisor ? block : n,
      [&](i64 i) { return key_element(kv, row, static_cast<i32>(begin + i)); },
      out + static_cast<i64>(blockIdx.x) * kv.head_dim);
}

template <sdk::Dtype kType>
__global__ void mean_queries_kernel(sdk::Queries q, i32 tile, bool full_divisor, i64 tiles, float* out) {
  const i64 head = blockIdx.x / tiles, begin = blockIdx.x % tiles * tile;
  const i64 n = min(q.count - begin, static_cast<i64>(tile));
  const i64 first = head / q.heads * q.seq_stride + head % q.heads * q.head_stride + begin * q.row_stride;
  mean_row<kType>(
      q.data, n, q.head_dim, full_divisor ? tile : n, [&](i64 i) { return first + i * q.row_stride; },
      out + static_cast<i64>(blockIdx.x) * q.head_dim);
}

// f(integral_constant of the type).
template <class F>
void with_type(sdk::Dtype type, F f) {
  if (type == sdk::Dtype::bf16) return f(std::integral_constant<sdk::Dtype, sdk::Dtype::bf16>{});
  if (type == sdk::Dtype::f16) return f(std::integral_constant<sdk::Dtype, sdk::Dtype::f16>{});
  f(std::integral_constant<sdk::Dtype, sdk::Dtype::f32>{});
}

void check_span(i32 span, const char* op) {
  if (span < 1) throw Error({"a mean is over no token", "at least 1", std::to_string(span), op, ""});
}

}  // namespace
}  // namespace cuda

sdk::i32 CudaOps::mean_keys(sdk::i32 block, sdk::i32 full_divisor, float* out, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    cuda::check_span(block, "mean_keys");
    const sdk::Paged& kv = call_.kv;
    const sdk::i64 blocks = cuda::ceil_div(kv.max_length, block);
    cuda::with_type(kv.dtype, [&](auto type) {
      cuda::launch("mean_keys", cuda::stream_of(call_), cuda::mean_keys_kernel<decltype(type)::value>, kv.rows * blocks,
                   cuda::kThreads, 0, kv, block, full_divisor != 0, blocks, out);
    });
    const double elements = static_cast<double>(kv.rows) * kv.max_length * kv.head_dim;
    cost_.bytes += elements * static_cast<double>(sdk::size_of(kv.dtype)) +
                   4. * static_cast<double>(kv.rows * blocks * kv.head_dim);
    cost_.flops += elements;
  });
}

sdk::i32 CudaOps::mean_queries(const sdk::Queries& q, sdk::i32 tile, sdk::i32 full_divisor, float* out,
                               sdk::Error* error) noexcept {
  return guarded(error, [&] {
    cuda::check_span(tile, "mean_queries");
    const sdk::i64 tiles = cuda::ceil_div<sdk::i64>(q.count, tile), heads = static_cast<sdk::i64>(q.seqs) * q.heads;
    cuda::with_type(q.dtype, [&](auto type) {
      cuda::launch("mean_queries", cuda::stream_of(call_), cuda::mean_queries_kernel<decltype(type)::value>,
                   heads * tiles, cuda::kThreads, 0, q, tile, full_divisor != 0, tiles, out);
    });
    const double elements = static_cast<double>(heads * q.count) * q.head_dim;
    cost_.bytes +=
        elements * static_cast<double>(sdk::size_of(q.dtype)) + 4. * static_cast<double>(heads * tiles * q.head_dim);
    cost_.flops += elements;
  });
}

}  // namespace lacuna
