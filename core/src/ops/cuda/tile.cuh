// The product behind every mass: a warp's strip of 16 queries of one head against a block of 64 keys, both in shared
// memory. Each thread holds the logits of two queries (its halves) and sixteen keys, in the order of the tensor cores'
// accumulators: query lane / 4 + 8 * half, key 8 * n + 2 * (lane % 4) + c, as x[n][2 * half + c].
//
// 16-bit operands go through m16n8k16 with fp32 sums. The fp64 product (m8n8k4, the same layout) serves fp32 operands,
// and blocks whose norms allow a large logit: what softmax sees is the difference of two logits, so their absolute
// error is what counts.
#pragma once

#include <cuda_fp16.h>

#include <cfloat>

#include "launch.cuh"

namespace lacuna::cuda {

using sdk::Dtype;

constexpr int kKeys = 64;   // of a block
constexpr int kStrip = 16;  // queries of a warp
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksAnSm = 4;  // that registers should allow: the rest of a block's loads hides behind the others
constexpr int kKeyTiles = kKeys / 8;
constexpr int kMaxHeadDim = 256;
constexpr float kNarrowLogit = 64.f;  // fp32 sums are good enough up to here
constexpr double kLog2E = 1.4426950408889634074;
constexpr float kNothing = -FLT_MAX;  // maximum of a row that has read nothing: finite, so that differences are no NaN

template <Dtype kType>
struct StoreOf {
  using type = u16;
};
template <>
struct StoreOf<Dtype::f32> {
  using type = float;
};
template <Dtype kType>
using Store = typename StoreOf<kType>::type;

/// Elements from one row of a tile to the next: 16 bytes more than the row, so that neighbouring rows use other banks.
template <Dtype kType>
__host__ __device__ constexpr int pitch(int depth) {
  return depth + 16 / static_cast<int>(sizeof(Store<kType>));
}

/// f(integral_constant of the type that tiles hold): 16 bits if queries and keys agree on them.
template <class F>
void with_tile_type(Dtype queries, Dtype keys, F f) {
  if (queries == Dtype::bf16 && keys == Dtype::bf16) return f(std::integral_constant<Dtype, Dtype::bf16>{});
  if (queries == Dtype::f16 && keys == Dtype::f16) return f(std::integral_constant<Dtype, Dtype::f16>{});
  f(std::integral_constant<Dtype, Dtype::f32>{});
}

/// Rows of head_dim stored elements.
struct Source {
  const void* data;
  Dtype dtype;
  i32 head_dim;
  bool aligned;  // every row begins at 16 bytes, and head_dim fills them
};

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

/// The larger of two, or NaN.
__device__ inline float larger_norm(float a, float b) { return b <= a ? a : isnan(a) ? a : b; }

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Channels c .. c + 8 of the row at element `row`, zeros past its end, and everywhere if row is negative.
template <Dtype kType>
__device__ void load_eight(Store<kType>* to, const Source& from, i64 row, int c) {
  if constexpr (kType != Dtype::f32) {
    const u16* data = static_cast<const u16*>(from.data);
    if (from.aligned) {
      uint4 eight{};
      if (row >= 0 && c < from.head_dim) eight = __ldg(reinterpret_cast<const uint4*>(data + row + c));
      *reinterpret_cast<uint4*>(to) = eight;
    } else {
      for (int e = 0; e < 8; ++e) to[e] = row >= 0 && c + e < from.head_dim ? data[row + c + e] : u16{0};
    }
  } else {
    for (int e = 0; e < 8; ++e)
      to[e] = row >= 0 && c + e < from.head_dim ? sdk::load(from.data, from.dtype, row + c + e) : 0.f;
  }
}

/// load_eight that may still be under way until wait_for_loads(): a thread's copies are in flight together, where loads
/// through registers would wait for each other.
template <Dtype kType>
__device__ void start_eight(Store<kType>* to, const Source& from, i64 row, int c) {
  if constexpr (kType != Dtype::f32) {
    if (from.aligned) {
      const bool there = row >= 0 && c < from.head_dim;
      const u16* address = static_cast<const u16*>(from.data) + (there ? row + c : 0);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :
                   : "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(address), "r"(there ? 16 : 0)
                   : "memory");
      return;
    }
  }
  load_eight<kType>(to, from, row, c);
}
__device__ inline void wait_for_loads() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Rows [0, rows) of a tile by `threads` threads; at(row): the row's first element, negative for zeros. The caller
/// makes its threads wait for each other.
template <Dtype kType, class At>
__device__ void load_rows(Store<kType>* to, int rows, int depth, const Source& from, int thread, int threads, At at) {
  const int eights = depth / 8, row_step = threads / eights, step = threads % eights;
  int row = thread / eights, eight = thread % eights;
  while (row < rows) {
    start_eight<kType>(to + row * pitch<kType>(depth) + eight * 8, from, at(row), eight * 8);
    row += row_step;
    eight += step;
    if (eight >= eights) {
      eight -= eights;
      ++row;
    }
  }
  wait_for_loads();
}

/// The shared memory of a block: its keys, and a strip of queries for each warp.
template <Dtype kType>
struct Tile {
  i64* element;          // [kKeys] first element of a key, -1 where there is none
  Store<kType>* keys;    // [kKeys, pitch]
  Store<kType>* strips;  // [kWarps * kStrip, pitch]
  unsigned char* rest;
  int depth;

  static std::size_t bytes(int depth) {
    return kKeys * sizeof(i64) +
           (kKeys + kWarps * kStrip) * static_cast<std::size_t>(pitch<kType>(depth)) * sizeof(Store<kType>);
  }
  __device__ Tile(void* memory, int depth) : depth(depth) {
    element = static_cast<i64*>(memory);
    keys = reinterpret_cast<Store<kType>*>(element + kKeys);
    strips = keys + kKeys * pitch<kType>(depth);
    rest = reinterpret_cast<unsigned char*>(strips + kWarps * kStrip * pitch<kType>(depth));
  }
  __device__ Store<kType>* strip() const { return strips + warp_id() * kStrip * pitch<kType>(depth); }

  /// Keys slot(0) .. slot(kKeys - 1) of a KV row, -1 for none. All threads; readers of the old ones are waited for.
  template <class Slot>
  __device__ void load_keys(const sdk::Paged& kv, const Source& from, i64 row, Slot slot) const {
    __syncthreads();
    if (threadIdx.x < kKeys) {
      const i64 s = slot(static_cast<int>(threadIdx.x));
      element[threadIdx.x] = s >= 0 ? key_element(kv, row, static_cast<i32>(s)) : -1;
    }
    __syncthreads();
    load_rows<kType>(keys, kKeys, depth, from, static_cast<int>(threadIdx.x), kThreads,
                     [this](int j) { return element[j]; });
    __syncthreads();
  }
  /// The warp's strip; at(i): first element of its i-th query, negative for none.
  template <class At>
  __device__ void load_strip(const Source& from, At at) const {
    __syncwarp();
    load_rows<kType>(strip(), kStrip, depth, from, lane_id(), 32, at);
    __syncwarp();
  }
};

__device__ inline void load_matrices(u32 (&r)[4], const u16* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

template <Dtype kType>
__device__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (kType == Dtype::bf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

template <Dtype kType>
__device__ double widened(Store<kType> x) {
  if constexpr (kType == Dtype::f32)
    return x;
  else if constexpr (kType == Dtype::bf16)
    return sdk::from_bf16(x);
  else
    return __half2float(__ushort_as_half(x));
}

/// x = the products of the warp's strip with the tile's keys, summed in T.
template <Dtype kType, class T>
__device__ void products(const Tile<kType>& tile, T (&x)[kKeyTiles][4]) {
  const int lane = lane_id(), step = pitch<kType>(tile.depth);
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[n][e] = 0;
  if constexpr (sizeof(T) == 4) {
    const u16* a_row = tile.strip() + lane % 16 * step + lane / 16 * 8;
    const u16* b_row = tile.keys + (lane / 16 * 8 + lane % 8) * step + lane / 8 % 2 * 8;
    for (int c = 0; c < tile.depth; c += 16) {
      u32 a[4];
      load_matrices(a, a_row + c);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        u32 b[4];
        load_matrices(b, b_row + n * 8 * step + c);
        multiply_add<kType>(x[n], a, b[0], b[1]);
        multiply_add<kType>(x[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const Store<kType>* a_row = tile.strip() + lane / 4 * step + lane % 4;
    const Store<kType>* b_row = tile.keys + lane / 4 * step + lane % 4;
    for (int c = 0; c < tile.depth; c += 4) {
      const double a0 = widened<kType>(a_row[c]), a1 = widened<kType>(a_row[8 * step + c]);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const double b = widened<kType>(b_row[n * 8 * step + c]);
        multiply_add(x[n][0], x[n][1], a0, b);
        multiply_add(x[n][2], x[n][3], a1, b);
      }
    }
  }
}

/// f(x): the products in fp32 where that is enough, else in fp64. Warp-uniform.
template <Dtype kType, class F>
__device__ void with_products(const Tile<kType>& tile, bool wide, F f) {
  if constexpr (kType != Dtype::f32) {
    if (!wide) {
      float x[kKeyTiles][4];
      products(tile, x);
      return f(x);
    }
  }
  double x[kKeyTiles][4];
  products(tile, x);
  f(x);
}

/// Key of a thread's element.
__device__ inline int key_index(int n, int c) { return n * 8 + lane_id() % 4 * 2 + c; }
__device__ inline int query_index(int half) { return lane_id() / 4 + half * 8; }

/// Running log-sum-exp of one query, base 2, over the keys that this thread has seen. `top` is where exponents are
/// measured from; it need not be the exact maximum.
struct Softmax {
  float top = kNothing;
  double sum = 0;

  __device__ void rescale(float new_top) {
    sum *= exp2_fast(top - new_top);
    top = new_top;
  }
  /// Of the four threads that share the query; -inf if none has read anything.
  __device__ double finish() {
    for (int mask = 1; mask <= 2; mask *= 2) {
      Softmax other;
      other.top = __shfl_xor_sync(~0u, top, mask);
      other.sum = __shfl_xor_sync(~0u, sum, mask);
      const float most = fmaxf(top, other.top);
      rescale(most);
      other.rescale(most);
      sum += other.sum;
    }
    return sum > 0 ? top + log2(sum) : -INFINITY;
  }
};

/// Adds a block to the two queries of each thread; `scale` makes base-2 logits; read(half, key): whether it is read.
template <class T, class Read>
__device__ void add_block(Softmax (&state)[2], T (&x)[kKeyTiles][4], double scale, Read read) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T most = kNothing;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        T& v = x[n][2 * half + c];
        v = read(half, key_index(n, c)) ? v * static_cast<T>(scale) : static_cast<T>(-INFINITY);
        most = v > most ? v : most;
      }
    if (static_cast<float>(most) > state[half].top) state[half].rescale(static_cast<float>(most));
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) sum += exp2_fast(static_cast<float>(x[n][2 * half + c] - state[half].top));
    state[half].sum += sum;
  }
}

/// f(half, n, c, probability) of every element of a block's products; lse in base 2, +inf for a query without a
/// softmax; weight(half, key): what is added to the base-2 logit, -inf for a cell that is not read.
template <class T, class Weight, class F>
__device__ void for_each_probability(const T (&x)[kKeyTiles][4], double scale, const double (&lse)[2], Weight weight,
                                     F f) {
  const T factor = static_cast<T>(scale), base[2] = {static_cast<T>(lse[0]), static_cast<T>(lse[1])};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const T shift = static_cast<T>(weight(half, key_index(n, c))) - base[half];
        f(half, n, c, exp2_fast(static_cast<float>(x[n][2 * half + c] * factor + shift)));
      }
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Most {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

/// Combines v over the eight threads that hold the same keys; the thread keeps keys lane / 4 * 8 + lane % 4 * 2 + c.
/// Halves what is held at each step, so 14 exchanges do for 16 keys.
template <class Combine>
__device__ float2 combine_queries(float (&v)[kKeyTiles][2], Combine combine) {
#pragma unroll
  for (int half = kKeyTiles / 2; half >= 1; half /= 2) {
    const bool upper = lane_id() & (half * 4);
#pragma unroll
    for (int n = 0; n < half; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float keep = upper ? v[n + half][c] : v[n][c], give = upper ? v[n][c] : v[n + half][c];
        v[n][c] = combine(keep, __shfl_xor_sync(~0u, give, half * 4));
      }
  }
  return {v[0][0], v[0][1]};
}

}  // namespace lacuna::cuda
