// XAttention's estimate (Xu et al. 2025, "XAttention: block sparse attention with antidiagonal scoring", arXiv
// 2503.16428). Query group i, reversed, against key group j is one product of vectors stride * head_dim long, summed
// residue by residue: at residue r a strip holds query i * stride + stride - 1 - r of each of its groups, and the tile
// key j * stride + r. A block takes a query tile of a KV row's heads, 64 (head, group) rows at a time, and goes through
// the key groups twice: log-sum-exp, then probabilities summed by unit.
#include <algorithm>

#include "lacuna/ops/cuda_ops.hpp"
#include "mass.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kRows = kWarps * kStrip;  // (head, group) rows at a time
constexpr int kCellPitch = kKeys + 1;

struct Groups {
  i64 stride, per_tile;  // per_tile: groups of a query tile, and of a unit
  i64 first;             // group of query 0 among the keys' groups
  double scale;          // from a product to a base-2 logit
};

// Logits of the warp's rows and key groups [begin, begin + kKeys), summed in T.
template <Dtype kType, class T>
__device__ void group_products(const Tile<kType>& tile, const Mass& m, const Groups& g, i64 kv_row, i64 begin,
                               const i64 (&query)[2], T (&x)[kKeyTiles][4]) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0;
  const i64 length = m.kv.length[kv_row];
  for (i64 r = 0; r < g.stride; ++r) {
    tile.load_keys(m.kv, m.keys, kv_row, [&](int j) {
      const i64 slot = (begin + j) * g.stride + r;
      return slot < length ? slot : -1;
    });
    // Lane i knows row i: its head, and the first query of its group.
    tile.load_strip(m.queries, [&](int i) {
      const i64 head = __shfl_sync(~0u, query[0], i), at = __shfl_sync(~0u, query[1], i) + g.stride - 1 - r;
      return head >= 0 && at < m.q.count ? m.query_element(head, at) : -1;
    });
    T residue[kKeyTiles][4];
    products(tile, residue);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] += residue[n][e];
  }
}
}  // namespace
}  // namespace cuda
}  // namespace lacuna
