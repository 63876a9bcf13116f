// Attention by tensor cores: FlashAttention-2's loop (Dao 2023, arXiv:2307.08691) over keys gathered from pages.
//
// A warp owns 16 packed rows: their logits, softmax state and output stay in its registers. Blocks of kKeys keys and
// values come by 16-byte asynchronous copies, two blocks in shared memory; while block n is computed, block n + 1 is
// under way and the pages of block n + 2 are looked up. Rows of shared memory are swizzled by 16-byte chunks so that
// the eight rows of a matrix load lie in different banks. One barrier a block.
#pragma once

#include <mutex>

#include "launch.hpp"
#include "mma.cuh"

namespace lacuna::cuda::attention {

template <int kHeadDim, int kWarps>
struct TensorShape {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kHeadDim <= 128 ? 64 : 32;  // 32 KiB of K and V, so that several blocks share an SM
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kGroups = kKeys / 32;  // warps' worth of keys
  static constexpr int kOwnGroups = (kGroups + kWarps - 1) / kWarps;
  static constexpr int kStage = kKeys * kHeadDim;  // elements of K or V of a block

  __device__ static int at(int row, int chunk) { return row * kHeadDim + ((chunk ^ (row & 7)) * 8); }
  static std::size_t shared_bytes(bool split_queries) {
    return sizeof(sdk::u16) * ((split_queries ? 2 : 1) * kRows * kHeadDim + 4 * kStage);
  }
};

/// What the threads of a block must know about a block of keys.
template <int kKeys>
struct KeyBlock {
  i32 source[kKeys];  // slot in the pool, or negative
  i32 slot[kKeys], until[kKeys];
  float weight[kKeys];  // times log2 e
  i32 masked[kKeys / 32];
};

/// Looks up keys a block ahead of their copies, in steps that do not wait for each other: entry of the list, page,
/// store.
template <class Shape>
class KeyLookup {
 public:
  __device__ KeyLookup(const Job& job, const BlockTile& tile, const TileKeys& keys)
      : job_(job), tile_(tile), keys_(keys), last_clock_(clock_of(job, tile, tile.slot(tile.end - 1))) {}

  __device__ void begin(i32 block) {
    for (int n = 0; n < Shape::kOwnGroups; ++n) next_[n] = keys_.entry(key(block, n));
  }
  /// Starts the loads of `block`, whose entries are there, and of the entries of the one after.
  __device__ void load(i32 block) {
    if (!mine(0)) return;
    for (int n = 0; n < Shape::kOwnGroups; ++n) {
      entry_[n] = next_[n];
      const i32 slot = entry_[n] & kSlotMask;
      page_[n] = entry_[n] == kNoKey ? 0 : job_.kv.table[tile_.kv_row * job_.kv.max_pages + slot / job_.kv.page_size];
      weight_[n] = keys_.weight && entry_[n] != kNoKey ? keys_.weight[key(block, n)] : 0.f;
      next_[n] = keys_.entry(key(block + 1, n));
    }
  }
  __device__ void store(KeyBlock<Shape::kKeys>& to) const {
    if (!mine(0)) return;
    for (int n = 0; n < Shape::kOwnGroups; ++n) {
      const i32 slot = entry_[n] & kSlotMask;
      i32 source = -1, until = 0;
      if (entry_[n] != kNoKey) {
        source = page_[n] * job_.kv.page_size + slot % job_.kv.page_size;
        until = until_of(job_, keys_, entry_[n], source);
      }
      const int at = group(n) * 32 + lane();
      to.source[at] = source;
      to.slot[at] = slot;
      to.until[at] = until;
      to.weight[at] = weight_[n] * kLog2e;
      const bool mask = keys_.weight || slot > tile_.slot(tile_.begin) || until <= last_clock_;
      const bool any = __any_sync(~0u, mask);
      if (lane() == 0) to.masked[group(n)] = any;
    }
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ static int group(int n) { return n * (Shape::kThreads / 32) + static_cast<int>(threadIdx.x / 32); }
  __device__ static bool mine(int n) { return group(n) < Shape::kGroups; }
  __device__ static i32 key(i32 block, int n) { return block * Shape::kKeys + group(n) * 32 + lane(); }

  const Job& job_;
  const BlockTile& tile_;
  const TileKeys& keys_;
  i32 last_clock_;
  i32 next_[Shape::kOwnGroups], entry_[Shape::kOwnGroups], page_[Shape::kOwnGroups];
  float weight_[Shape::kOwnGroups];
};

/// Starts the copies of a block's keys and values.
template <class Shape>
__device__ void copy_block(const Job& job, const KeyBlock<Shape::kKeys>& block, sdk::u16* k, sdk::u16* v) {
  const auto *pool_k = static_cast<const sdk::u16*>(job.kv.k), *pool_v = static_cast<const sdk::u16*>(job.kv.v);
#pragma unroll 4
  for (int n = 0; n < Shape::kKeys * Shape::kChunks / Shape::kThreads; ++n) {
    const int c = n * Shape::kThreads + static_cast<int>(threadIdx.x), key = c / Shape::kChunks,
              chunk = c % Shape::kChunks;
    const i32 source = block.source[key];
    const i64 from = (static_cast<i64>(max(source, 0)) * Shape::kChunks + chunk) * 8;
    copy_async(k + Shape::at(key, chunk), pool_k + from, source >= 0);
    copy_async(v + Shape::at(key, chunk), pool_v + from, source >= 0);
  }
  commit_copies();
}

/// The tile's queries in the cache's dtype, zeros in rows beyond its end; `low` gets what rounding leaves, if split.
template <Dtype kType, class Shape>
__device__ void load_queries(const Job& job, const BlockTile& tile, sdk::u16* high, sdk::u16* low) {
  const auto round = [](float x) { return kType == Dtype::bf16 ? sdk::to_bf16(x) : sdk::to_f16(x); };
  const auto widen = [](sdk::u16 x) { return kType == Dtype::bf16 ? sdk::from_bf16(x) : sdk::from_f16(x); };
  for (int c = static_cast<int>(threadIdx.x); c < Shape::kRows * Shape::kChunks; c += Shape::kThreads) {
    const int row = c / Shape::kChunks, chunk = c % Shape::kChunks, to = Shape::at(row, chunk);
    const i32 packed = tile.begin + row;
    const bool inside = packed < tile.end;
    const i64 from = inside ? tile.seq * job.q.seq_stride + tile.head(packed) * job.q.head_stride +
                                  tile.query(packed) * job.q.row_stride + chunk * 8
                            : 0;
    if (job.vector_queries) {
      *reinterpret_cast<uint4*>(high + to) =
          inside ? *reinterpret_cast<const uint4*>(static_cast<const sdk::u16*>(job.q.data) + from) : uint4{};
      continue;
    }
    for (int e = 0; e < 8; ++e) {
      const float x = inside ? sdk::load(job.q.data, job.q.dtype, from + e) : 0.f;
      high[to + e] = round(x);
      if (job.split_queries) low[to + e] = round(x - widen(high[to + e]));
    }
  }
}

/// s += q k^T for the warp's 16 rows.
template <Dtype kType, class Shape, int kTiles>
__device__ void add_logits(float (&s)[kTiles][4], const sdk::u16* q, const sdk::u16* k) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int c = 0; c < Shape::kChunks; c += 2) {
    unsigned a[4];
    load_matrices(a, q + Shape::at(warp * 16 + lane % 16, c + lane / 16));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      unsigned b[4];
      load_matrices(b, k + Shape::at(n * 8 + lane / 16 * 8 + lane % 8, c + lane / 8 % 2));
      multiply_add<kType>(s[n], a, b[0], b[1]);
      multiply_add<kType>(s[n + 1], a, b[2], b[3]);
    }
  }
}

/// out += p v for the warp's 16 rows.
template <Dtype kType, class Shape, int kTiles, int kOutTiles>
__device__ void add_values(float (&out)[kOutTiles][4], const float (&p)[kTiles][4], const sdk::u16* v) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const unsigned a[4] = {pack<kType>(p[n][0], p[n][1]), pack<kType>(p[n][2], p[n][3]),
                           pack<kType>(p[n + 1][0], p[n + 1][1]), pack<kType>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
    for (int c = 0; c < kOutTiles; c += 2) {
      unsigned b[4];
      load_matrices_transposed(b, v + Shape::at(n * 8 + lane % 16, c + lane / 16));
      multiply_add<kType>(out[c], a, b[0], b[1]);
      multiply_add<kType>(out[c + 1], a, b[2], b[3]);
    }
  }
}

/// Running softmax of a thread's two rows. The sums are the thread's own until the end.
struct SoftmaxState {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

  /// Turns logits (in powers of two) into probabilities relative to the new maximum; `keep`: what it leaves of old
  /// sums.
  template <int kTiles>
  __device__ void soften(float (&s)[kTiles][4], float (&keep)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = top[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float base = most == -INFINITY ? 0.f : most;  // a difference of infinities is no number
      keep[r] = exp2_fast(top[r] - base);
      top[r] = most;
      float added = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[n][e] = exp2_fast(s[n][e] - base);
          added += s[n][e];
        }
      sum[r] = sum[r] * keep[r] + added;
    }
  }
};

template <Dtype kType, int kHeadDim, int kWarps>
__global__ __launch_bounds__(32 * kWarps) void tensor_kernel(const __grid_constant__ Job job) {
  using Shape = TensorShape<kHeadDim, kWarps>;
  extern __shared__ uint4 shared[];
  __shared__ KeyBlock<Shape::kKeys> blocks[3];

  const BlockTile tile(job);
  if (tile.begin == tile.end) return;
  const TileKeys keys(job, tile);
  const i32 all = (keys.count + Shape::kKeys - 1) / Shape::kKeys, part = (all + job.splits - 1) / job.splits;
  const i32 first = min(tile.part * part, all), last = min(first + part, all);

  auto* q_high = reinterpret_cast<sdk::u16*>(shared);
  auto* q_low = q_high + Shape::kRows * kHeadDim;
  auto* stages = job.split_queries ? q_low + Shape::kRows * kHeadDim : q_low;
  const auto stage = [&](i32 n) { return stages + (n & 1) * 2 * Shape::kStage; };

  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  i32 packed[2], slot[2], clock[2];
  for (int r = 0; r < 2; ++r) {
    packed[r] = tile.begin + warp * 16 + lane / 4 + 8 * r;
    slot[r] = packed[r] < tile.end ? tile.slot(packed[r]) : -1;
    clock[r] = clock_of(job, tile, slot[r]);
  }
  const float scale = job.layer.softmax_scale * kLog2e;
  float out[kHeadDim / 8][4] = {};
  SoftmaxState state;

  KeyLookup<Shape> lookup(job, tile, keys);
  lookup.begin(first);
  for (i32 n = 0; n < 2; ++n) {
    lookup.load(first + n);
    lookup.store(blocks[n]);
  }
  load_queries<kType, Shape>(job, tile, q_high, q_low);
  __syncthreads();
  if (first < last) copy_block<Shape>(job, blocks[0], stage(0), stage(0) + Shape::kStage);

  for (i32 n = 0; n < last - first; ++n) {
    wait_for_copies();
    __syncthreads();
    if (first + n + 1 < last) copy_block<Shape>(job, blocks[(n + 1) % 3], stage(n + 1), stage(n + 1) + Shape::kStage);
    lookup.load(first + n + 2);

    const sdk::u16 *k = stage(n), *v = k + Shape::kStage;
    float s[Shape::kKeys / 8][4] = {};
    add_logits<kType, Shape>(s, q_high, k);
    if (job.split_queries) add_logits<kType, Shape>(s, q_low, k);

    const KeyBlock<Shape::kKeys>& block = blocks[n % 3];
#pragma unroll
    for (int t = 0; t < Shape::kKeys / 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[t][e] *= scale;
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) {
      if (!block.masked[g]) continue;
#pragma unroll
      for (int t = 4 * g; t < 4 * g + 4; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = t * 8 + lane % 4 * 2 + e % 2, r = e / 2;
          const bool reads = block.slot[key] <= slot[r] && clock[r] < block.until[key];
          s[t][e] = reads ? s[t][e] + block.weight[key] : -INFINITY;
        }
      }
    }

    float keep[2];
    state.soften(s, keep);
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[c][e] *= keep[e / 2];
    add_values<kType, Shape>(out, s, v);
    if (job.precise) {
#pragma unroll
      for (int t = 0; t < Shape::kKeys / 8; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[t][e] = residue<kType>(s[t][e]);
      add_values<kType, Shape>(out, s, v);
    }
    lookup.store(blocks[(n + 2) % 3]);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (packed[r] >= tile.end) continue;
    const i64 row = result_row(job, tile, packed[r]);
    const float share = sum == 0.f ? 0.f : 1.f / sum;
    auto* to = reinterpret_cast<float2*>(job.results.out + row * kHeadDim) + lane % 4;
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c) to[c * 4] = {out[c][2 * r] * share, out[c][2 * r + 1] * share};
    if (lane % 4 == 0) job.results.lse[row] = sum == 0.f ? -INFINITY : (state.top[r] + log2f(sum)) * kLn2;
  }
}

template <Dtype kType, int kHeadDim, int kWarps>
void launch_tensor_kernel(const Job& job, i64 blocks, cudaStream_t stream) {
  using Shape = TensorShape<kHeadDim, kWarps>;
  const std::size_t bytes = Shape::shared_bytes(job.split_queries);
  {
    // The limit must not shrink between another thread's call and its launch.
    static std::mutex setting;
    static std::size_t most = 0;
    const std::lock_guard lock(setting);
    most = bytes > most ? bytes : most;
    cudaFuncSetAttribute(tensor_kernel<kType, kHeadDim, kWarps>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(most));
  }
  tensor_kernel<kType, kHeadDim, kWarps><<<static_cast<unsigned>(blocks), Shape::kThreads, bytes, stream>>>(job);
  check_launch("attention on tensor cores");
}

template <int kHeadDim>
void launch_tensor(const Job& job, i64 blocks, cudaStream_t stream) {
  const auto with_type = [&]<Dtype kType>() {
    switch (job.tile_rows) {
      case 16: return launch_tensor_kernel<kType, kHeadDim, 1>(job, blocks, stream);
      case 64: return launch_tensor_kernel<kType, kHeadDim, 4>(job, blocks, stream);
      default:
        if constexpr (kHeadDim <= kWideHeadDim) launch_tensor_kernel<kType, kHeadDim, 8>(job, blocks, stream);
    }
  };
  if (job.kv.dtype == Dtype::bf16)
    with_type.template operator()<Dtype::bf16>();
  else
    with_type.template operator()<Dtype::f16>();
}

}  // namespace lacuna::cuda::attention
