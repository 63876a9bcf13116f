// The matched oracle of an eviction: one sum over all queries of each KV head ranks its tokens, and for each method one
// pass over the keys adds up what every query reads of those that are kept.
#include <algorithm>

#include "lacuna/metrics/cuda_oracle.hpp"
#include "lacuna/ops/cuda_ops.hpp"
#include "layer_mass.cuh"

namespace lacuna {
namespace {

using cuda::kKeys;
using cuda::kStrip;
using cuda::kThreads;
using cuda::kWarps;
using sdk::Dtype;
using sdk::i32;
using sdk::i64;
using sdk::u64;

constexpr const char* kOp = "matched_evict_oracle";

/// read [rows, length]: 1 for the tokens listed (ascending, [rows, cut]) and those from the cut on; zeros before.
__global__ void read_kernel(const i32* tokens, const i32* count, i64 rows, i64 cut, i64 length, unsigned char* read) {
  const i64 n = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (n >= rows * length) return;
  const i64 row = n / length, i = n % length;
  if (i >= cut)
    read[n] = 1;
  else if (i < count[row])
    read[row * length + tokens[row * cut + i]] = 1;
}

/// A block: four strips of a KV row (its heads' strips in a row) against all its keys. mass [heads, queries].
template <Dtype kType>
__global__ void __launch_bounds__(kThreads, cuda::kBlocksAnSm)
    kept_mass_kernel(cuda::Mass m, i64 strips, const unsigned char* read, double* mass) {
  extern __shared__ uint4 shared[];
  const cuda::Tile<kType> tile(shared, m.depth);
  const i64 quads = cuda::ceil_div<i64>(m.group * strips, kWarps), kv_row = blockIdx.x / quads;
  const i64 n = blockIdx.x % quads * kWarps + cuda::warp_id(), first = n % strips * kStrip;
  const int count = n < m.group * strips ? static_cast<int>(min(static_cast<i64>(kStrip), m.count - first)) : 0;
  const cuda::Strip strip{kv_row * m.group + n / strips, first, count};
  const int lane = cuda::lane_id();
  i32 slot[2];
  strip.slots(m, kv_row, slot);
  strip.load(tile, m);
  const float norm = strip.norm(m);
  double lse[2], sum[2] = {};
  for (int half = 0; half < 2; ++half)
    lse[half] = slot[half] >= 0 ? m.lse[strip.head * m.count + first + cuda::query_index(half)] : INFINITY;
  for (i64 begin = 0; begin < m.kv.max_length; begin += kKeys) {
    const int keys = static_cast<int>(min(static_cast<i64>(kKeys), m.kv.max_length - begin));
    const unsigned char* reads = read + kv_row * m.kv.max_length + begin;
    const u64 low = __ballot_sync(~0u, lane < keys && reads[lane] != 0);
    const u64 members = low | static_cast<u64>(__ballot_sync(~0u, lane + 32 < keys && reads[lane + 32] != 0)) << 32;
    if (members == 0) continue;  // for all warps, so none is waited for
    tile.load_keys(m.kv, m.keys, kv_row, [&](int j) { return j < keys ? begin + j : -1; });
    if (count == 0) continue;
    float part[2] = {};
    cuda::with_products(tile, cuda::is_wide(norm, m.key_norm[kv_row * m.key_blocks() + begin / kKeys]), [&](auto& x) {
      cuda::for_each_probability(
          x, m.scale, lse,
          [&](int half, int key) { return begin + key <= slot[half] && (members >> key & 1) ? 0.f : -INFINITY; },
          [&](int half, int, int, float value) { part[half] += value; });
    });
    for (int half = 0; half < 2; ++half) sum[half] += part[half];
  }
  for (int half = 0; half < 2; ++half) {
    for (int mask = 1; mask <= 2; mask *= 2) sum[half] += __shfl_xor_sync(~0u, sum[half], mask);
    if (lane % 4 == 0 && cuda::query_index(half) < count)
      mass[strip.head * m.count + first + cuda::query_index(half)] = sum[half];
  }
}

void sum_kept(const cuda::Mass& m, const unsigned char* read, double* mass, cudaStream_t stream) {
  const i64 strips = cuda::ceil_div<i64>(m.count, kStrip);
  const i64 blocks = m.kv.rows * cuda::ceil_div<i64>(m.group * strips, kWarps);
  cuda::with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    cuda::launch(kOp, stream, kept_mass_kernel<kType>, blocks, kThreads, cuda::Tile<kType>::bytes(m.depth), m, strips,
                 read, mass);
  });
}

}  // namespace

std::vector<std::vector<double>> matched_evict_oracle_cuda(const Attention& a, i64 cut, const float* dense_lse,
                                                           const std::vector<std::vector<i64>>& kept, Device& device) {
  if (kept.empty() || a.q.count == 0) return std::vector<std::vector<double>>(kept.size());
  const i64 rows = a.kv.rows, length = a.kv.max_length, heads = static_cast<i64>(a.q.seqs) * a.layer.num_qo_heads;
  const auto stream = static_cast<cudaStream_t>(device.stream());
  const std::shared_ptr<Device> shared = borrowed(device);
  const LayerMass layer = prepare_layer_mass(a, dense_lse, device, kOp);
  const sdk::Rows all{a.q.seqs,  a.layer.num_kv_heads, 0, 1, static_cast<i32>(a.q.count), 0,
                      a.q.count, a.q.first_position};
  const Buffer<float> column(shared, rows * cut);
  cuda::sum_units(layer.mass, {all, column.data(), cut, cut, 1, 1.}, false, stream, kOp);

  sdk::Call call{};
  call.on_device = 1;
  call.stream = device.stream();
  Cost cost;
  CudaOps ops(call, cost, nullptr, 0);
  const Buffer<i32> n(shared, rows), k(shared, rows), count(shared, rows), tokens(shared, rows * cut);
  const std::vector<i32> whole(static_cast<std::size_t>(rows), static_cast<i32>(cut));
  device.copy_in(n.data(), whole.data(), whole.size() * sizeof(i32));
  const Buffer<unsigned char> read(shared, rows * length);
  const Buffer<double> mass(shared, heads * a.q.count);
  std::vector<std::vector<double>> out(kept.size(), std::vector<double>(static_cast<std::size_t>(mass.size())));
  for (std::size_t m = 0; m < kept.size(); ++m) {
    const std::vector<i32> wanted(kept[m].begin(), kept[m].end());
    device.copy_in(k.data(), wanted.data(), wanted.size() * sizeof(i32));
    sdk::Error error{};
    if (ops.topk(column.data(), static_cast<i32>(rows), cut, n.data(), k.data(), tokens.data(), count.data(), cut,
                 &error) != 0)
      throw Error({error.text, "", "", kOp, ""});
    device.fill(read.data(), 0, static_cast<std::size_t>(read.size()));
    cuda::launch(kOp, stream, read_kernel, cuda::ceil_div<i64>(rows * length, kThreads), kThreads, 0, tokens.data(),
                 count.data(), rows, cut, length, read.data());
    sum_kept(layer.mass, read.data(), mass.data(), stream);
    device.copy_out(out[m].data(), mass.data(), out[m].size() * sizeof(double));
  }
  return out;
}

}  // namespace lacuna
