#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "mass.cuh"

namespace lacuna::cuda {
namespace {

constexpr i64 kWantedBlocks = 1024;  // enough to fill a GPU several times

__global__ void seen_kernel(sdk::Paged kv, i64 first_position, i64 positions, i32* seen) {
  const i64 n = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x;
  if (n < kv.rows * positions) seen[n] = kv.visible(n / positions, first_position + n % positions);
}

// Norm of the row at an element, by a thread.
template <Dtype kType>
__device__ float row_norm(const Source& from, i64 element) {
  float sum = 0;
#pragma unroll 4
  for (int c = 0; c < from.head_dim; c += 8) {
    alignas(16) Store<kType> eight[8];
    load_eight<kType>(eight, from, element, c);
    for (const Store<kType> stored : eight) {
      const float x = static_cast<float>(widened<kType>(stored));
      sum += x * x;
    }
  }
  return sqrtf(sum);
}

template <Dtype kType>
__global__ void query_norm_kernel(Mass m, float scale, float* out) {
  const i64 row = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x;
  if (row < m.heads() * m.count)
    out[row] = scale * row_norm<kType>(m.queries, m.query_element(row / m.count, row % m.count));
}

// A warp a block of keys, two keys a thread.
template <Dtype kType>
__global__ void key_norm_kernel(Mass m, float* out) {
  const i64 block = blockIdx.x * static_cast<i64>(kWarps) + warp_id();
  if (block >= m.kv.rows * m.key_blocks()) return;
  const i64 row = block / m.key_blocks(), begin = block % m.key_blocks() * kKeys;
  const i64 end = min(static_cast<i64>(m.kv.length[row]), begin + kKeys);
  float most = 0;
  for (i64 s = begin + lane_id(); s < end; s += 32)
    most = larger_norm(most, row_norm<kType>(m.keys, key_element(m.kv, row, static_cast<i32>(s))));
  for (int mask = 16; mask >= 1; mask /= 2) most = larger_norm(most, __shfl_xor_sync(~0u, most, mask));
  if (lane_id() == 0) out[block] = most;
}

// A block: four strips of a KV row (its heads' strips in a row) against `chunk` blocks of keys.
template <Dtype kType>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    lse_kernel(Mass m, i64 strips, i64 chunks, i64 chunk, double* out) {
  extern __shared__ uint4 shared[];
  const Tile<kType> tile(shared, m.depth);
  const i64 quads = ceil_div<i64>(m.group * strips, kWarps);
  const i64 kv_row = blockIdx.x / (quads * chunks), quad = blockIdx.x / chunks % quads, part = blockIdx.x % chunks;
  const auto strip_at = [&](i64 n) {
    const i64 first = n % strips * kStrip;
    const int count = n < m.group * strips ? static_cast<int>(min(static_cast<i64>(kStrip), m.count - first)) : 0;
    return Strip{kv_row * m.group + n / strips, first, count};
  };
  const Strip strip = strip_at(quad * kWarps + warp_id());
  i32 last = -1;  // that any of the block's queries sees
  for (int w = 0; w < kWarps; ++w)
    if (const Strip s = strip_at(quad * kWarps + w); s.count > 0)
      last = max(last, m.slot(kv_row, s.first + s.count - 1));

  i32 slot[2];
  strip.slots(m, kv_row, slot);
  strip.load(tile, m);
  const float norm = strip.norm(m);
  Softmax state[2];
  for (i64 block = part * chunk; block < (part + 1) * chunk && block * kKeys <= last; ++block) {
    const i64 begin = block * kKeys;
    tile.load_keys(m.kv, m.keys, kv_row, [&](int j) { return begin + j <= last ? begin + j : -1; });
    if (strip.count == 0) continue;
    with_products(tile, is_wide(norm, m.key_norm[kv_row * m.key_blocks() + block]), [&](auto& x) {
      add_block(state, x, m.scale, [&](int half, int key) { return begin + key <= slot[half]; });
    });
  }
  for (int half = 0; half < 2; ++half) {
    const double lse = state[half].finish();
    if (lane_id() % 4 == 0 && query_index(half) < strip.count)
      out[part * m.heads() * m.count + strip.head * m.count + strip.first + query_index(half)] = lse;
  }
}

// Into the first chunk's place.
__global__ void merge_lse_kernel(i64 n, i64 chunks, double* lse) {
  const i64 i = blockIdx.x * static_cast<i64>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  double top = -INFINITY, sum = 0;
  for (i64 c = 0; c < chunks; ++c) top = max(top, lse[c * n + i]);
  for (i64 c = 0; c < chunks && top > -INFINITY; ++c) sum += exp2(lse[c * n + i] - top);
  lse[i] = top > -INFINITY ? top + log2(sum) : top;
}

// A block owns some whole units of a tile of a KV row's queries (`span` slots: as many units as fit in a block of keys,
// or one longer one) and goes through the group's heads, so that every sum has one order.
template <Dtype kType, class Combine>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    unit_kernel(Mass m, UnitSums out, i64 span, i64 spans, WarpSplit split, Combine combine) {
  extern __shared__ uint4 shared[];
  const Tile<kType> tile(shared, m.depth);
  double* part = reinterpret_cast<double*>(tile.rest);  // [kWarps, kKeys] of the keys that are loaded
  double* total = part + kWarps * kKeys;                // [heads at once, units]
  const sdk::Rows& rows = out.rows;
  const i64 kv_row = blockIdx.x / (rows.tiles * spans), t = blockIdx.x / spans % rows.tiles;
  const i64 first_slot = blockIdx.x % spans * span, first_unit = first_slot / out.unit_tokens;
  const i64 query_begin = rows.query_begin(t) - m.begin, query_end = rows.query_end(t) - m.begin;
  const i32 last = m.slot(kv_row, query_end - 1);
  if (first_slot > last) return;
  const i64 end_slot = min(first_slot + span, static_cast<i64>(last) + 1),
            strips = ceil_div<i64>(query_end - query_begin, kStrip);
  const i64 units = min(out.units - first_unit, ceil_div(end_slot - first_slot, static_cast<i64>(out.unit_tokens)));
  const int at_once = split.heads_at_once(), sums = rows.per_query_head ? at_once : 1;
  const int warps = rows.per_query_head ? split.ways : kWarps;  // that one sum adds up

  for (int h = 0; h < m.group; h += at_once) {
    if (h == 0 || rows.per_query_head)
      for (i64 n = threadIdx.x; n < sums * units; n += kThreads) total[n] = 0;
    for (i64 begin = first_slot; begin < end_slot; begin += kKeys) {
      if (h == 0 || span > kKeys)  // else they are still there
        tile.load_keys(m.kv, m.keys, kv_row, [&](int j) { return begin + j < end_slot ? begin + j : -1; });
      double sum[2] = {};
      const i64 head = kv_row * m.group + h + split.head();
      for (i64 s = split.way(); s < strips && h + split.head() < m.group; s += split.ways) {
        const i64 first = query_begin + s * kStrip;
        const Strip strip{head, first, static_cast<int>(min(static_cast<i64>(kStrip), query_end - first))};
        if (m.slot(kv_row, first + strip.count - 1) < begin) continue;
        strip.load(tile, m);
        i32 slot[2];
        strip.slots(m, kv_row, slot);
        double lse[2];
        for (int half = 0; half < 2; ++half)
          lse[half] = slot[half] >= 0 ? m.lse[head * m.count + first + query_index(half)] : INFINITY;
        float p[kKeyTiles][2] = {};
        const float* norm = m.key_norm + kv_row * m.key_blocks();
        const i64 last_key = min(begin + kKeys, end_slot) - 1;
        with_products(
            tile, is_wide(strip.norm(m), larger_norm(norm[begin / kKeys], norm[last_key / kKeys])), [&](auto& x) {
              for_each_probability(
                  x, m.scale, lse, [&](int half, int key) { return begin + key <= slot[half] ? 0.f : -INFINITY; },
                  [&](int, int n, int c, float value) { p[n][c] = combine(p[n][c], value); });
            });
        const float2 both = combine_queries(p, combine);
        sum[0] = combine(sum[0], static_cast<double>(both.x));
        sum[1] = combine(sum[1], static_cast<double>(both.y));
      }
      const int key = lane_id() / 4 * 8 + lane_id() % 4 * 2;
      part[warp_id() * kKeys + key] = sum[0];
      part[warp_id() * kKeys + key + 1] = sum[1];
      __syncthreads();
      for (i64 n = threadIdx.x; n < sums * units; n += kThreads) {
        const i64 unit_begin = span > kKeys ? 0 : n % units * out.unit_tokens;
        const i64 unit_end = min(end_slot - begin, span > kKeys ? kKeys : unit_begin + out.unit_tokens);
        for (int w = 0; w < warps; ++w)
          for (i64 j = unit_begin; j < unit_end; ++j)
            total[n] = combine(total[n], part[(n / units * warps + w) * kKeys + j]);
      }
      __syncthreads();
    }
    if (!rows.per_query_head && h + at_once < m.group) continue;
    for (i64 n = threadIdx.x; n < sums * units; n += kThreads) {
      const i64 head = h + n / units;
      if (rows.per_query_head && head >= m.group) continue;
      const i64 row = (rows.per_query_head ? kv_row * m.group + head : kv_row) * rows.tiles + t;
      out.value[row * out.stride + first_unit + n % units] = static_cast<float>(total[n] / out.divisor);
    }
  }
}

template <Dtype kType, class Combine>
void launch_units(const Mass& m, const UnitSums& out, Combine combine, cudaStream_t stream, const char* op) {
  const i64 span = out.unit_tokens > kKeys ? out.unit_tokens : kKeys / out.unit_tokens * out.unit_tokens;
  const i64 spans = ceil_div(std::min<i64>(m.kv.max_length, out.units * out.unit_tokens), span);
  const WarpSplit split(ceil_div<i64>(std::min<i64>(out.rows.q_tile, m.count), kStrip));
  launch(op, stream, unit_kernel<kType, Combine>, m.kv.rows * out.rows.tiles * spans, kThreads,
         Tile<kType>::bytes(m.depth) + 2 * kWarps * kKeys * sizeof(double), m, out, span, spans, split, combine);
}

bool all_aligned(const void* data, i32 head_dim, std::initializer_list<i64> strides) {
  bool aligned = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && head_dim % 8 == 0;
  for (const i64 s : strides) aligned = aligned && s % 8 == 0;
  return aligned;
}

void find_seen(Mass& m, i64 first_position, Carver& workspace, cudaStream_t stream, const char* op) {
  m.first_position = first_position;
  m.positions = m.q.first_position + m.begin + m.count - first_position;
  const i64 n = m.kv.rows * m.positions;
  i32* seen = workspace.take<i32>(n);
  launch(op, stream, seen_kernel, ceil_div<i64>(n, 256), 256, 0, m.kv, first_position, m.positions, seen);
  m.seen = seen;
}

}  // namespace

Mass make_mass(const sdk::Call& call, const sdk::Queries& q, i64 begin, i64 count, const char* op) {
  if (q.head_dim > kMaxHeadDim)
    throw Error({"the head is too large for the GPU's operations", "head_dim up to " + std::to_string(kMaxHeadDim),
                 std::to_string(q.head_dim), op, "Use device = \"cpu\"."});
  const sdk::Paged& kv = call.kv;
  Mass m{};
  m.kv = kv;
  m.q = q;
  m.keys = {kv.k, kv.dtype, kv.head_dim, all_aligned(kv.k, kv.head_dim, {})};
  m.queries = {q.data, q.dtype, q.head_dim,
               all_aligned(q.data, q.head_dim, {q.seq_stride, q.head_stride, q.row_stride})};
  m.begin = begin;
  m.count = count;
  m.group = call.layer.group();
  m.depth = ceil_div(q.head_dim, 16) * 16;
  m.scale = static_cast<double>(call.layer.softmax_scale) * kLog2E;
  return m;
}

void find_norms(Mass& m, float scale, Carver& workspace, cudaStream_t stream, const char* op) {
  const i64 rows = m.heads() * m.count, blocks = m.kv.rows * m.key_blocks();
  float* query_norm = workspace.take<float>(rows);
  float* key_norm = workspace.take<float>(blocks);
  with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    launch(op, stream, query_norm_kernel<kType>, ceil_div<i64>(rows, kThreads), kThreads, 0, m, std::abs(scale),
           query_norm);
    launch(op, stream, key_norm_kernel<kType>, ceil_div<i64>(blocks, kWarps), kThreads, 0, m, key_norm);
  });
  m.query_norm = query_norm;
  m.key_norm = key_norm;
}

Mass prepare_mass(const sdk::Call& call, const sdk::Queries& q, i64 begin, i64 count, i64 first_position,
                  Carver& workspace, const char* op) {
  Mass m = make_mass(call, q, begin, count, op);
  find_seen(m, first_position, workspace, stream_of(call), op);
  find_norms(m, call.layer.softmax_scale, workspace, stream_of(call), op);
  return m;
}

void find_lse(Mass& m, Carver& workspace, cudaStream_t stream, const char* op) {
  const i64 strips = ceil_div<i64>(m.count, kStrip), quads = ceil_div<i64>(m.group * strips, kWarps),
            n = m.heads() * m.count;
  // Few queries: the keys are cut into chunks, too, and their sums merged in order.
  const i64 wanted =
      std::clamp<i64>(kWantedBlocks / std::max<i64>(1, m.kv.rows * quads), 1, std::max<i64>(1, m.key_blocks()));
  const i64 chunk = ceil_div(m.key_blocks(), wanted),
            chunks = std::max<i64>(1, ceil_div(m.key_blocks(), std::max<i64>(1, chunk)));
  double* lse = workspace.take<double>(n * chunks);
  m.lse = lse;
  with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    launch(op, stream, lse_kernel<kType>, m.kv.rows * quads * chunks, kThreads, Tile<kType>::bytes(m.depth), m, strips,
           chunks, chunk, lse);
  });
  if (chunks > 1) launch(op, stream, merge_lse_kernel, ceil_div<i64>(n, 256), 256, 0, n, chunks, lse);
}

std::size_t mass_workspace_bytes(const sdk::Layer& layer, i32 seqs, i64 max_tokens, i64 max_queries) {
  const i64 heads = static_cast<i64>(seqs) * layer.num_qo_heads, rows = static_cast<i64>(seqs) * layer.num_kv_heads;
  const i64 bytes = rows * max_tokens * 4 + heads * max_queries * 4 + rows * ceil_div<i64>(max_tokens, kKeys) * 4 +
                    (heads * max_queries + kWantedBlocks * kWarps * kStrip) * 8;
  return static_cast<std::size_t>(bytes) + 4 * Carver::kAlignment;
}

void sum_units(const Mass& m, const UnitSums& out, bool maximum, cudaStream_t stream, const char* op) {
  with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
    constexpr Dtype kType = decltype(type)::value;
    if (maximum)
      launch_units<kType>(m, out, Most{}, stream, op);
    else
      launch_units<kType>(m, out, Add{}, stream, op);
  });
}

double pairs_at_most(const Mass& m) {
  double pairs = 0;
  for (i64 i = 0; i < m.count; ++i)
    pairs += static_cast<double>(std::min<i64>(m.kv.max_length, m.q.first_position + m.begin + i + 1));
  return pairs * static_cast<double>(m.heads());
}

double key_bytes_at_most(const sdk::Paged& kv) {
  return static_cast<double>(kv.rows) * kv.max_length * kv.head_dim * static_cast<double>(sdk::size_of(kv.dtype));
}

double query_bytes(const sdk::Queries& q) {
  return static_cast<double>(q.seqs) * q.heads * static_cast<double>(q.count) * q.head_dim *
         static_cast<double>(sdk::size_of(q.dtype));
}

}  // namespace lacuna::cuda
