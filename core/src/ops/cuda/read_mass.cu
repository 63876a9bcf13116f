// The probabilities that attention computed, summed by key: exp(logit - lse) over the cells that it read. A block owns
// the columns of 64 slots of a KV row. What a row's lists say of a slot is looked up in a table [rows, slots] that one
// kernel fills for as many tiles as fit in the workspace; the sums go on from one batch of tiles to the next.
#include <algorithm>

#include "lacuna/ops/cuda_ops.hpp"
#include "mass.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

constexpr u32 kUnlisted = ~0u;
constexpr std::size_t kTableBytes = 64u << 20;

// What is read by tiles [tile, tile + tiles) of the rows: every visible slot if there are no lists.
struct Read {
  sdk::Selection set;
  bool listed;
  i64 tile, tiles, strips;  // strips: of a tile
  i32 q_tile;
  i64 num_queries, sliding_window;
  // [seq, head, tile, slot] who lists a slot: the piece that starts first, at the first place, before any token at the
  // first place. piece entry: (kv_block - 1 - offset in the piece) * piece_capacity + place; token entry after those.
  u32* owner;
  i64 slots;  // of a row of the table
  bool first, last;

  __device__ i64 table_row(i64 row) const { return row / set.rows.tiles * tiles + row % set.rows.tiles - tile; }
  __device__ float log_weight(i64 row, u32 entry) const {
    const u32 pieces = static_cast<u32>(set.kv_block) * static_cast<u32>(set.piece_capacity);
    if (entry < pieces)
      return set.piece_log_weight ? set.piece_log_weight[row * set.piece_capacity + entry % set.piece_capacity] : 0.f;
    return set.token_log_weight ? set.token_log_weight[row * set.token_capacity + (entry - pieces)] : 0.f;
  }
  __device__ bool weighted() const { return set.piece_log_weight || set.token_log_weight; }
};

// A block a row of the table. The least entry wins, so the order of writes does not matter.
__global__ void owner_kernel(sdk::Paged kv, i32 num_kv_heads, Read r) {
  const sdk::Selection& set = r.set;
  const i64 row = blockIdx.x / r.tiles * set.rows.tiles + r.tile + blockIdx.x % r.tiles;
  const i64 length = min(static_cast<i64>(kv.length[set.rows.kv_row(row, num_kv_heads)]), r.slots);
  u32* owner = r.owner + blockIdx.x * r.slots;
  if (set.full && set.full[row]) return;
  const i64 pieces = set.piece_count ? set.piece_count[row] : 0, tokens = set.token_count ? set.token_count[row] : 0;
  for (i64 n = threadIdx.x; n < pieces * set.kv_block; n += blockDim.x) {
    const i64 place = n / set.kv_block, offset = n % set.kv_block,
              slot = set.pieces[row * set.piece_capacity + place] + offset;
    if (slot >= 0 && slot < length)
      atomicMin(owner + slot, static_cast<u32>((set.kv_block - 1 - offset) * set.piece_capacity + place));
  }
  for (i64 place = threadIdx.x; place < tokens; place += blockDim.x)
    if (const i64 slot = set.tokens[row * set.token_capacity + place]; slot >= 0 && slot < length)
      atomicMin(owner + slot, static_cast<u32>(static_cast<i64>(set.kv_block) * set.piece_capacity + place));
}

// What the rows of a warp's tile say of the loaded keys.
struct Lists {
  u64 members;
  i64 sinks, window;
  float* log_weight;  // [kKeys] shared, base 2; null: none
};

__device__ Lists lists_of(const Read& r, i64 row, i64 begin, int keys, float* weights) {
  const sdk::Selection& set = r.set;
  if (!r.listed || (set.full && set.full[row])) return {~u64{0}, 0, 0, nullptr};
  const int lane = lane_id();
  const u32* owner = r.owner + r.table_row(row) * r.slots + begin;
  const u32 low = lane < keys ? owner[lane] : kUnlisted, high = lane + 32 < keys ? owner[lane + 32] : kUnlisted;
  Lists out{};
  out.members = static_cast<u64>(__ballot_sync(~0u, high != kUnlisted)) << 32 | __ballot_sync(~0u, low != kUnlisted);
  if (set.exact_sinks) out.sinks = set.exact_sinks[row];
  if (set.exact_window) out.window = set.exact_window[row];
  if (!r.weighted()) return out;
  out.log_weight = weights;
  __syncwarp();
  weights[lane] = low != kUnlisted ? static_cast<float>(kLog2E) * r.log_weight(row, low) : 0.f;
  weights[lane + 32] = high != kUnlisted ? static_cast<float>(kLog2E) * r.log_weight(row, high) : 0.f;
  __syncwarp();
  return out;
}

template <Dtype kType>
constexpr std::size_t read_bytes(int depth) {
  return Tile<kType>::bytes(depth) + kWarps * kKeys * (sizeof(double) + sizeof(float)) + kKeys * sizeof(i32);
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads, kBlocksAnSm)
    read_kernel(Mass m, Read r, const float* lse, WarpSplit split, double* sums, float* columns, i64 stride) {
  extern __shared__ uint4 shared[];
  const Tile<kType> tile(shared, m.depth);
  double* part = reinterpret_cast<double*>(tile.rest);  // [kWarps, kKeys]
  float* weights = reinterpret_cast<float*>(part + kWarps * kKeys) + warp_id() * kKeys;
  i32* key_position = reinterpret_cast<i32*>(reinterpret_cast<float*>(part + kWarps * kKeys) + kWarps * kKeys);
  const i64 kv_row = blockIdx.x / m.key_blocks(), block = blockIdx.x % m.key_blocks(), begin = block * kKeys;
  const int keys = static_cast<int>(min(static_cast<i64>(kKeys), m.kv.length[kv_row] - begin));
  if (keys <= 0) return;
  tile.load_keys(m.kv, m.keys, kv_row, [&](int j) { return j < keys ? begin + j : -1; });
  if (const int j = static_cast<int>(threadIdx.x); r.sliding_window > 0 && j < keys)
    key_position[j] = m.kv.position_of(kv_row, begin + j);
  __syncthreads();
  const int at_once = split.heads_at_once();

  for (int h = 0; h < m.group; h += at_once) {
    double sum[2] = {};
    const i64 head = kv_row * m.group + h + split.head();
    for (i64 n = split.way(); n < r.tiles * r.strips && h + split.head() < m.group; n += split.ways) {
      const i64 t = r.tile + n / r.strips;  // of the call
      const i64 query_begin = (r.listed ? r.set.rows.tile_begin + t : t) * r.q_tile;
      const i64 first = query_begin + n % r.strips * kStrip, query_end = min(query_begin + r.q_tile, r.num_queries);
      if (first >= query_end) continue;
      const Strip strip{head, first, static_cast<int>(min(static_cast<i64>(kStrip), query_end - first))};
      if (m.slot(kv_row, first + strip.count - 1) < begin) continue;
      const i64 row = (r.listed && r.set.rows.per_query_head ? head : kv_row) * (r.listed ? r.set.rows.tiles : 1) + t;
      const Lists lists = lists_of(r, row, begin, keys, weights);
      if (lists.members == 0 && lists.sinks <= begin &&
          (lists.window <= 0 || m.slot(kv_row, first) - (begin + keys - 1) >= lists.window))
        continue;
      strip.load(tile, m);
      i32 slot[2];
      strip.slots(m, kv_row, slot);
      double base[2];
      i64 oldest[2];  // position that the sliding window still holds
      for (int half = 0; half < 2; ++half) {
        const float at = slot[half] >= 0 ? lse[head * m.count + first + query_index(half)] : -INFINITY;
        base[half] = at > -INFINITY ? at * kLog2E : INFINITY;
        oldest[half] =
            r.sliding_window > 0 && slot[half] >= 0 ? m.kv.position_of(kv_row, slot[half]) - r.sliding_window + 1 : 0;
      }
      const auto weight = [&](int half, int key) {
        const bool member = lists.members >> key & 1;
        bool read = begin + key <= slot[half] &&
                    (member || begin + key < lists.sinks || slot[half] - (begin + key) < lists.window);
        if (r.sliding_window > 0) read = read && key_position[key] >= oldest[half];
        return !read ? -INFINITY : lists.log_weight ? lists.log_weight[key] : 0.f;
      };
      float p[kKeyTiles][2] = {};
      with_products(tile, is_wide(strip.norm(m), m.key_norm[kv_row * m.key_blocks() + block]), [&](auto& x) {
        for_each_probability(x, m.scale, base, weight, [&](int, int n, int c, float value) { p[n][c] += value; });
      });
      const float2 both = combine_queries(p, Add{});
      sum[0] += both.x;
      sum[1] += both.y;
    }
    const int key = lane_id() / 4 * 8 + lane_id() % 4 * 2;
    part[warp_id() * kKeys + key] = sum[0];
    part[warp_id() * kKeys + key + 1] = sum[1];
    __syncthreads();
    for (int n = static_cast<int>(threadIdx.x); n < at_once * kKeys; n += kThreads) {
      const i64 slot = begin + n % kKeys, out = kv_row * m.group + h + n / kKeys;
      if (h + n / kKeys >= m.group || n % kKeys >= keys || slot >= stride) continue;
      double total = r.first ? 0. : sums[out * m.kv.max_length + slot];
      for (int w = 0; w < split.ways; ++w) total += part[(n / kKeys * split.ways + w) * kKeys + n % kKeys];
      if (r.last)
        columns[out * stride + slot] += static_cast<float>(total);
      else
        sums[out * m.kv.max_length + slot] = total;
    }
    __syncthreads();
  }
}

void check_lists(const sdk::Selection& set) {
  const u64 entries =
      static_cast<u64>(set.kv_block) * static_cast<u64>(set.piece_capacity) + static_cast<u64>(set.token_capacity);
  if (entries >= kUnlisted)
    throw Error(
        {"a row's lists are too long", "fewer than 2^32 slots named", std::to_string(entries), "read_mass", ""});
}

void read_mass(const sdk::Call& call, const sdk::Attended& attended, Mass& m, Carver& workspace, float* columns,
               i64 stride) {
  const cudaStream_t stream = stream_of(call);
  const i64 slots = call.kv.max_length;
  Read r{};
  r.q_tile = static_cast<i32>(m.count);
  r.num_queries = m.count;
  r.sliding_window = attended.read ? 0 : call.layer.sliding_window;
  i64 all_tiles = 1, batch = 1, table_rows = 0;
  double* sums = workspace.take<double>(m.heads() * slots);
  if (attended.read) {
    check_lists(*attended.read);
    r.set = *attended.read;
    r.listed = true;
    r.q_tile = r.set.rows.q_tile;
    r.num_queries = r.set.rows.num_queries;
    r.slots = slots;
    all_tiles = r.set.rows.tiles;
    table_rows = static_cast<i64>(r.set.rows.seqs) * r.set.rows.heads;
    const std::size_t tile_bytes = static_cast<std::size_t>(table_rows * slots) * sizeof(u32);
    batch = std::clamp<i64>(static_cast<i64>(workspace.left() / tile_bytes), 1, all_tiles);
    r.owner = workspace.take<u32>(batch * table_rows * slots);
  }
  r.strips = ceil_div<i64>(std::min<i64>(r.q_tile, m.count), kStrip);
  for (r.tile = 0; r.tile < all_tiles; r.tile += batch) {
    r.tiles = std::min(batch, all_tiles - r.tile);
    r.first = r.tile == 0;
    r.last = r.tile + r.tiles == all_tiles;
    if (r.listed) {
      check(
          cudaMemsetAsync(r.owner, 0xff, static_cast<std::size_t>(r.tiles * table_rows * slots) * sizeof(u32), stream),
          "read_mass");
      launch("read_mass", stream, owner_kernel, table_rows * r.tiles, 256, 0, m.kv, call.layer.num_kv_heads, r);
    }
    with_tile_type(m.q.dtype, m.kv.dtype, [&](auto type) {
      constexpr Dtype kType = decltype(type)::value;
      launch("read_mass", stream, read_kernel<kType>, m.kv.rows * m.key_blocks(), kThreads, read_bytes<kType>(m.depth),
             m, r, attended.lse, WarpSplit(r.tiles * r.strips), sums, columns, stride);
    });
  }
}

}  // namespace

std::size_t read_workspace_bytes(const sdk::Layer& layer, i32 seqs, i64 max_tokens, i64 max_queries) {
  const i64 heads = static_cast<i64>(seqs) * layer.num_qo_heads;
  const std::size_t tile_bytes = static_cast<std::size_t>(heads * max_tokens) * sizeof(u32);
  const std::size_t tiles = std::clamp<std::size_t>(kTableBytes / std::max<std::size_t>(1, tile_bytes), 1,
                                                    static_cast<std::size_t>(std::max<i64>(1, max_queries)));
  return tiles * tile_bytes + static_cast<std::size_t>(heads * max_tokens) * sizeof(double) + 2 * Carver::kAlignment;
}

}  // namespace cuda

sdk::i32 CudaOps::read_mass(const sdk::Attended& attended, float* columns, sdk::i64 stride,
                            sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const sdk::Queries& q = attended.queries;
    if (q.count == 0 || call_.kv.max_length == 0) return;
    cuda::Carver workspace(workspace_, workspace_bytes_, "read_mass");
    cuda::Mass m = cuda::prepare_mass(call_, q, 0, q.count, q.first_position, workspace, "read_mass");
    cuda::read_mass(call_, attended, m, workspace, columns, stride);
    cost_.flops += 2. * cuda::pairs_at_most(m) * q.head_dim;
    cost_.bytes += cuda::key_bytes_at_most(call_.kv) + cuda::query_bytes(q) +
                   8. * static_cast<double>(m.heads()) * static_cast<double>(stride);
  });
}

}  // namespace lacuna
