// Attention of any head size and cache dtype in fp32 arithmetic: a warp a packed row, 32 keys a step. A lane computes
// one key's logit; then the warp adds the 32 values channel by channel.
#include "launch.hpp"

namespace lacuna::cuda::attention {
namespace {

template <class F>
__device__ float warp_reduce(float x, F f) {
  for (int step = 16; step > 0; step /= 2) x = f(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

template <Dtype kType>
__global__ __launch_bounds__(32 * kGenericTileRows) void generic_kernel(const __grid_constant__ Job job) {
  extern __shared__ float shared[];  // query and output of each warp
  const BlockTile tile(job);
  const i32 lane = static_cast<i32>(threadIdx.x % 32), warp = static_cast<i32>(threadIdx.x / 32);
  const i32 packed = tile.begin + warp, d = job.layer.head_dim;
  if (packed >= tile.end) return;
  const TileKeys keys(job, tile);
  const i32 part = ((keys.count + 31) / 32 + job.splits - 1) / job.splits * 32;
  const i32 first = min(tile.part * part, keys.count), last = min(first + part, keys.count);
  const i32 slot = tile.slot(packed), clock = clock_of(job, tile, slot);

  float *q = shared + 2 * warp * d, *out = q + d;
  for (i32 c = lane; c < d; c += 32) {
    q[c] = job.q.at(tile.seq, tile.head(packed), tile.query(packed), c) * (job.layer.softmax_scale * kLog2e);
    out[c] = 0.f;
  }
  __syncwarp();

  float top = -INFINITY, sum = 0.f;
  for (i32 n = first; n < last; n += 32) {
    const i32 entry = n + lane < last ? keys.entry(n + lane) : kNoKey, key_slot = entry & kSlotMask;
    i64 source = -1;
    float x = -INFINITY;
    if (key_slot <= slot) {
      source = job.kv.physical(tile.kv_row, key_slot);
      if (clock < until_of(job, keys, entry, static_cast<i32>(source))) {
        x = keys.weight ? keys.weight[n + lane] * kLog2e : 0.f;
        for (i32 c = 0; c < d; ++c) x = fmaf(q[c], sdk::load(job.kv.k, kType, source * d + c), x);
      }
    }
    const float most = fmaxf(top, warp_reduce(x, [](float a, float b) { return fmaxf(a, b); }));
    const float base = most == -INFINITY ? 0.f : most;  // a difference of infinities is no number
    const float keep = exp2f(top - base), p = exp2f(x - base);
    top = most;
    sum = sum * keep + warp_reduce(p, [](float a, float b) { return a + b; });
    if (x == -INFINITY) source = -1;
    for (i32 begin = 0; begin < d; begin += 32) {
      const i32 c = begin + lane;  // every lane joins each shuffle
      float value = c < d ? out[c] * keep : 0.f;
      for (int key = 0; key < 32; ++key) {
        const float weight = __shfl_sync(~0u, p, key);
        const i64 from = __shfl_sync(~0u, source, key);
        if (from >= 0 && c < d) value = fmaf(weight, sdk::load(job.kv.v, kType, from * d + c), value);
      }
      if (c < d) out[c] = value;
    }
  }

  const i64 row = result_row(job, tile, packed);
  for (i32 c = lane; c < d; c += 32) job.results.out[row * d + c] = sum == 0.f ? 0.f : out[c] / sum;
  if (lane == 0) job.results.lse[row] = sum == 0.f ? -INFINITY : (top + log2f(sum)) * kLn2;
}

}  // namespace

void launch_generic(const Job& job, i64 blocks, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    const std::size_t bytes = sizeof(float) * 2 * kGenericTileRows * static_cast<std::size_t>(job.layer.head_dim);
    kernel<<<static_cast<unsigned>(blocks), 32 * kGenericTileRows, bytes, stream>>>(job);
  };
  switch (job.kv.dtype) {
    case Dtype::bf16: start(generic_kernel<Dtype::bf16>); break;
    case Dtype::f16: start(generic_kernel<Dtype::f16>); break;
    default: start(generic_kernel<Dtype::f32>);
  }
  check_launch("generic attention");
}

}  // namespace lacuna::cuda::attention
