// XAttention's estimate (Xu et al. 2025, "XAttention: block sparse attention with antidiagonal scoring", arXiv
// 2503.16428). Query group i, reversed, against key group j is one product of vectors stride * head_dim long, summed
// residue by residue: at residue r a strip holds query i * stride + stride - 1 - r of each of its groups, and the tile
// key j * stride + r. A block takes a query tile of a KV row's heads, 64 (head, group) rows at a time, and goes through
// the key groups twice: log-sum-exp, then probabilities summed by unit.
#include <algorithm>
#include <cmath>

#include "lacuna/ops/cuda_ops.hpp"
#include "mass.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kRows = kWarps * kStrip;  // (head, group) rows at a time
constexpr int kCellPitch = kKeys + 1;

struct Groups {
  i32 stride, per_tile;  // per_tile: groups of a query tile, and of a unit
  i64 first;             // the first tile's first group, counted as the keys' groups are
  double scale;          // from a product to a base-2 logit
};

// A query tile of a KV row, and the (head, group) rows [row, row + kRows) of it. Row: head of the group * per_tile +
// group.
struct GroupTile {
  i64 kv_row, query_begin, groups, key_groups;
  int row;
};

// x = products of the warp's rows with key groups [begin, begin + kKeys), summed in T; all threads.
template <Dtype kType, class T>
__device__ void group_products(const Tile<kType>& tile, const Mass& m, const Groups& g, const GroupTile& t, i64 begin,
                               T (&x)[kKeyTiles][4]) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0;
  const i64 length = m.kv.length[t.kv_row], first_query = m.query_element(t.kv_row * m.group, 0);
  for (int r = 0; r < g.stride; ++r) {
    tile.load_keys(m.kv, m.keys, t.kv_row, [&](int j) {
      const i64 slot = (begin + j) * g.stride + r;
      return slot < length ? slot : -1;
    });
    tile.load_strip(m.queries, [&](int i) {
      const int row = t.row + warp_id() * kStrip + i, h = row / g.per_tile;
      const i64 query = t.query_begin + (row - h * g.per_tile) * g.stride + g.stride - 1 - r;
      return h < m.group && query < m.count ? first_query + h * m.q.head_stride + query * m.q.row_stride : -1;
    });
    T residue[kKeyTiles][4];
    products(tile, residue);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] += residue[n][e];
  }
}

// The largest norm of the tile's queries, to every thread.
__device__ float tile_norm(const Mass& m, const GroupTile& t, i64 queries, float* scratch) {
  float most = 0;
  for (i64 n = threadIdx.x; n < m.group * queries; n += kThreads) {
    const i64 head = t.kv_row * m.group + n / queries;
    most = larger_norm(most, m.query_norm[head * m.count + t.query_begin + n % queries]);
  }
  scratch[threadIdx.x] = most;
  __syncthreads();
  for (int n = 0; n < kThreads; ++n) most = larger_norm(most, scratch[n]);
  __syncthreads();
  return most;
}

// Adds the cells [kRows, kCellPitch] of key groups [begin, begin + keys) to the units of the rows' heads.
__device__ void add_units(const Mass& m, const Groups& g, const GroupTile& t, i64 begin, int keys, float* cells,
                          const sdk::Scores& out, i64 tile_index) {
  const i64 unit = begin / g.per_tile;
  const int units = static_cast<int>((begin + keys - 1) / g.per_tile - unit) + 1;
  if (threadIdx.x < kRows) {  // each row in place: unit u is written where its cells have been read
    float* row = cells + threadIdx.x * kCellPitch;
    for (int u = 0, j = 0; u < units; ++u) {
      double sum = 0;
      for (; j < keys && (begin + j) / g.per_tile == unit + u; ++j) sum += row[j];
      row[u] = static_cast<float>(sum);
    }
  }
  __syncthreads();
  const int head = t.row / g.per_tile, heads = min(m.group, (t.row + kRows - 1) / g.per_tile + 1) - head;
  for (int n = static_cast<int>(threadIdx.x); n < heads * units; n += kThreads) {
    const int h = head + n / units, u = n % units;
    if (unit + u >= out.units) continue;
    double sum = 0;
    const int end = min((h + 1) * g.per_tile, t.row + kRows);
    for (int row = max(h * g.per_tile, t.row); row < end; ++row) sum += cells[(row - t.row) * kCellPitch + u];
    const i64 at = (t.kv_row * m.group + h) * out.rows.tiles + tile_index;
    out.value[at * out.stride + unit + u] += static_cast<float>(sum / static_cast<double>(t.groups));
  }
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads) antidiagonal_kernel(Mass m, Groups g, sdk::Scores out) {
  extern __shared__ uint4 shared[];
  const Tile<kType> tile(shared, m.depth);
  float* cells = reinterpret_cast<float*>(tile.rest);
  const i64 tile_index = out.rows.tiles - 1 - blockIdx.x / m.kv.rows;  // the longest first
  GroupTile t{};
  t.kv_row = blockIdx.x % m.kv.rows;
  t.query_begin = tile_index * out.rows.q_tile;
  const i64 queries = min(m.count - t.query_begin, static_cast<i64>(out.rows.q_tile));
  t.groups = ceil_div<i64>(queries, g.stride);
  const i64 first_group = g.first + tile_index * g.per_tile;
  t.key_groups = min(first_group + t.groups, ceil_div<i64>(m.kv.length[t.kv_row], g.stride));
  if (t.key_groups <= 0) return;
  const i64 units = min(ceil_div<i64>(t.key_groups, g.per_tile), static_cast<i64>(out.units));
  for (i64 n = threadIdx.x; n < m.group * units; n += kThreads)
    out.value[((t.kv_row * m.group + n / units) * out.rows.tiles + tile_index) * out.stride + n % units] = 0;

  const float query_norm = tile_norm(m, t, queries, cells);
  const auto with_logits = [&](i64 begin, auto f) {
    if constexpr (kType != Dtype::f32) {
      float key_norm = 0;
      const i64 end = min(((begin + kKeys) * g.stride - 1) / kKeys + 1, m.key_blocks());
      for (i64 b = begin * g.stride / kKeys; b < end; ++b)
        key_norm = larger_norm(key_norm, m.key_norm[t.kv_row * m.key_blocks() + b]);
      if (!is_wide(query_norm, key_norm)) {
        float x[kKeyTiles][4];
        group_products(tile, m, g, t, begin, x);
        return f(x);
      }
    }
    double x[kKeyTiles][4];
    group_products(tile, m, g, t, begin, x);
    f(x);
  };

  const int span = g.per_tile <= kKeys ? kKeys / g.per_tile * g.per_tile : kKeys;  // whole units, if they fit
  for (t.row = 0; t.row < m.group * g.per_tile; t.row += kRows) {
    i64 last[2];  // key group that the thread's rows see, -1 for no row
    for (int half = 0; half < 2; ++half) {
      const int row = t.row + warp_id() * kStrip + query_index(half), i = row % g.per_tile;
      last[half] = row < m.group * g.per_tile && i < t.groups ? min(first_group + i, t.key_groups - 1) : -1;
    }
    Softmax state[2];
    for (i64 begin = 0; begin < t.key_groups; begin += span)
      with_logits(begin, [&](auto& x) {
        add_block(state, x, g.scale, [&](int half, int key) { return key < span && begin + key <= last[half]; });
      });
    double lse[2];
    for (int half = 0; half < 2; ++half) {
      lse[half] = state[half].finish();
      if (last[half] < 0) lse[half] = INFINITY;
    }
    for (i64 begin = 0; begin < t.key_groups; begin += span) {
      with_logits(begin, [&](auto& x) {
        for_each_probability(
            x, g.scale, lse,
            [&](int half, int key) { return key < span && begin + key <= last[half] ? 0.f : -INFINITY; },
            [&](int half, int n, int c, float p) {
              cells[(warp_id() * kStrip + query_index(half)) * kCellPitch + key_index(n, c)] = p;
            });
      });
      __syncthreads();
      add_units(m, g, t, begin, static_cast<int>(min(static_cast<i64>(span), t.key_groups - begin)), cells, out,
                tile_index);
    }
  }
}

void check_groups(const sdk::Scores& out, const sdk::Queries& q, const sdk::Layer& layer, i32 stride) {
  const auto refuse = [](const char* what, const char* expected, std::string found) {
    throw Error({what, expected, std::move(found), "antidiagonal_mass", ""});
  };
  if (!out.rows.per_query_head || out.rows.heads != layer.num_qo_heads)
    refuse("rows are not those of the query heads", "per_query_head = 1", std::to_string(out.rows.heads) + " heads");
  if (stride < 1 || out.unit_tokens != out.rows.q_tile || out.unit_tokens % stride != 0)
    refuse("tile, unit and stride do not fit", "q_tile = unit_tokens, a multiple of the stride",
           "q_tile " + std::to_string(out.rows.q_tile) + ", unit_tokens " + std::to_string(out.unit_tokens) +
               ", stride " + std::to_string(stride));
  if (q.first_position % stride != 0)
    refuse("the queries begin inside a group", "first_position a multiple of the stride",
           std::to_string(q.first_position));
}

}  // namespace
}  // namespace cuda

sdk::i32 CudaOps::antidiagonal_mass(const sdk::Queries& q, sdk::i32 stride, sdk::Scores& out,
                                    sdk::Error* error) noexcept {
  return guarded(error, [&] {
    using sdk::i64;
    const char* op = "antidiagonal_mass";
    cuda::check_groups(out, q, call_.layer, stride);
    const sdk::Rows& rows = out.rows;
    const i64 begin = rows.query_begin(0),
              count = std::min(q.count - begin, static_cast<i64>(rows.tiles) * rows.q_tile);
    if (rows.count() == 0 || count <= 0 || call_.kv.max_length == 0) return;
    cuda::Carver workspace(workspace_, workspace_bytes_, op);
    const cudaStream_t stream = cuda::stream_of(call_);
    cuda::Mass m = cuda::make_mass(call_, q, begin, count, op);
    const double root = std::sqrt(static_cast<double>(q.head_dim));
    cuda::find_norms(m, static_cast<float>(1. / root), workspace, stream, op);
    const cuda::Groups groups{stride, rows.q_tile / stride, (q.first_position + begin) / stride,
                              cuda::kLog2E / (root * stride)};
    cuda::with_tile_type(q.dtype, call_.kv.dtype, [&](auto type) {
      constexpr sdk::Dtype kType = decltype(type)::value;
      cuda::launch(op, stream, cuda::antidiagonal_kernel<kType>, m.kv.rows * rows.tiles, cuda::kThreads,
                   cuda::Tile<kType>::bytes(m.depth) + cuda::kRows * cuda::kCellPitch * sizeof(float), m, groups, out);
    });
    cost_.flops += 2. * cuda::pairs_at_most(m) / stride * q.head_dim;
    cost_.bytes +=
        cuda::key_bytes_at_most(call_.kv) + cuda::query_bytes(q) + 4. * static_cast<double>(rows.count() * out.units);
  });
}

}  // namespace lacuna
