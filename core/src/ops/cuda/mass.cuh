// What the softmax masses share: the queries of a call against the cached keys, the facts that are computed once for
// all passes (slots visible at a position, norms, log-sum-exp), and the pass that sums probabilities by key.
#pragma once

#include "tile.cuh"

namespace lacuna::cuda {

/// Queries [begin, begin + count) of `q` against `kv`. Head: sequence * q.heads + query head; it reads KV row head /
/// group.
struct Mass {
  sdk::Paged kv;
  sdk::Queries q;
  Source keys, queries;
  i64 begin, count;
  i32 group, depth;  // depth: head_dim in whole tensor-core steps
  double scale;      // from a product to a base-2 logit
  const i32* seen;   // [kv.rows, positions] slots visible at original position first_position + i
  i64 first_position, positions;
  const float* query_norm;  // [heads, count], of scaled queries
  const float* key_norm;    // [kv.rows, key_blocks()] largest of a block
  const double* lse;        // [heads, count] base 2

  LACUNA_HD i64 heads() const { return static_cast<i64>(q.seqs) * q.heads; }
  LACUNA_HD i64 key_blocks() const { return (kv.max_length + kKeys - 1) / kKeys; }
  /// The last slot that query i of the range sees, -1 for none.
  LACUNA_HD i32 slot(i64 kv_row, i64 i) const {
    return seen[kv_row * positions + q.first_position + begin + i - first_position] - 1;
  }
  LACUNA_HD i64 query_element(i64 head, i64 i) const {
    return head / q.heads * q.seq_stride + head % q.heads * q.head_stride + (begin + i) * q.row_stride;
  }
};

/// The shapes of a range; what the steps below compute is missing yet.
Mass make_mass(const sdk::Call& call, const sdk::Queries& q, i64 begin, i64 count, const char* op);
/// Computes query_norm and key_norm; `scale` makes logits of products.
void find_norms(Mass& mass, float scale, Carver& workspace, cudaStream_t stream, const char* op);
/// All of it but lse; `seen` begins at an original position.
Mass prepare_mass(const sdk::Call& call, const sdk::Queries& q, i64 begin, i64 count, i64 first_position,
                  Carver& workspace, const char* op);
/// Computes lse over every visible key.
void find_lse(Mass& mass, Carver& workspace, cudaStream_t stream, const char* op);
std::size_t mass_workspace_bytes(const sdk::Layer& layer, i32 seqs, i64 max_tokens, i64 max_queries);

/// Bytes that read_mass takes besides.
std::size_t read_workspace_bytes(const sdk::Layer& layer, i32 seqs, i64 max_tokens, i64 max_queries);

/// Sums (or maxima) of the probabilities by unit of `unit_tokens` slots, over the queries of each tile.
struct UnitSums {
  sdk::Rows rows;  // tiles of absolute queries; per query head, or summed over the group
  float* value;    // [rows, stride]; only units that the tile sees are written
  i64 stride, units;
  i32 unit_tokens;
  double divisor;
};
void sum_units(const Mass& mass, const UnitSums& out, bool maximum, cudaStream_t stream, const char* op);

/// Pairs that the queries may see, if every row is as long as the longest.
double pairs_at_most(const Mass& mass);
double key_bytes_at_most(const sdk::Paged& kv);
double query_bytes(const sdk::Queries& q);

/// A warp's strip: some consecutive queries of one head.
struct Strip {
  i64 head, first;  // first query, within the range
  int count;        // at most kStrip; 0: nothing to do

  template <Dtype kType>
  __device__ void load(const Tile<kType>& tile, const Mass& m) const {
    const i64 begin = m.query_element(head, first);
    tile.load_strip(m.queries, [&](int i) { return i < count ? begin + i * m.q.row_stride : -1; });
  }
  /// Last visible slots of the thread's two queries, -1 where there is no query.
  __device__ void slots(const Mass& m, i64 kv_row, i32 (&out)[2]) const {
    for (int half = 0; half < 2; ++half)
      out[half] = query_index(half) < count ? m.slot(kv_row, first + query_index(half)) : -1;
  }
  __device__ float norm(const Mass& m) const {
    const int lane = lane_id();
    float most = lane < count ? m.query_norm[head * m.count + first + lane] : 0.f;
    for (int mask = 16; mask >= 1; mask /= 2) most = larger_norm(most, __shfl_xor_sync(~0u, most, mask));
    return most;
  }
};

/// Whether products of these norms need fp64; NaN and overflow do.
__device__ inline bool is_wide(float query_norm, float key_norm) { return !(query_norm * key_norm <= kNarrowLogit); }

/// How the warps of a block share the strips of some heads: `ways` warps a head, kWarps / ways heads at once.
struct WarpSplit {
  int ways;
  __host__ __device__ explicit WarpSplit(i64 strips) : ways(strips >= 4 ? 4 : strips >= 2 ? 2 : 1) {}
  __device__ int heads_at_once() const { return kWarps / ways; }
  __device__ int head() const { return warp_id() / ways; }
  __device__ int way() const { return warp_id() % ways; }
};

}  // namespace lacuna::cuda
