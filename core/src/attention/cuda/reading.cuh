// Which queries a thread block serves and which keys they read: shared by the tensor-core and the generic kernel.
//
// A row (of the selection; read densely, one for all queries of a KV head) holds the queries of a tile for `heads`
// query heads that read the same keys. Its (query, head) pairs are packed query by query, so that a group's heads share
// each block of keys and a tile spans few queries. A thread block takes tile_rows of them, and of their keys one of
// `splits` parts.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "lacuna/attention/attention.hpp"

namespace lacuna::cuda::attention {

using sdk::Dtype;
using sdk::i32;
using sdk::i64;

constexpr i32 kAlways = INT_MAX;    // `until` of a key that every later query reads
constexpr i32 kFullRow = -1;        // ListTable::count of a row that reads every visible slot
constexpr i32 kSlotMask = INT_MAX;  // an entry of a list is a slot; its sign bit: only the exact window holds it
constexpr i32 kNoKey = -1;          // beyond the last entry (no slot: the mask gives INT_MAX)
constexpr float kLog2e = 1.4426950408889634f;  // softmax works in powers of two
constexpr float kLn2 = 0.6931471805599453f;

/// Key lists of consecutive rows of a selection, made by launch_lists.
struct ListTable {
  const i32* slot;      // [rows, stride] ascending entries; null: dense reading
  const float* weight;  // [rows, stride] log weights, or null
  const i32* count;     // [rows]
  i64 stride;
};

/// Where results go: query i of a head to row i - first_query, `queries` rows a head. Parts of split keys follow each
/// other, each a normalised result.
struct Results {
  float *out, *lse;
  i64 first_query, queries;
};

struct Job {
  sdk::Layer layer;
  sdk::Paged kv;
  sdk::Queries q;
  sdk::Rows rows;
  i64 row_begin;  // first row of this launch and of its lists
  i32 heads, tile_rows, tiles_per_row, splits;
  bool split_queries;   // of another dtype than the cache
  bool vector_queries;  // 16-byte loads are possible
  bool precise;         // probabilities as a sum of two numbers of the cache's dtype
  ListTable lists;
  const i32* exact_window;  // [all rows] or null
  Results results;
};

/// First i in [begin, end) for which `before` is false; it is true up to some point only. For a whole warp: 32 probes a
/// round, because each waits for memory.
template <class F>
__device__ i32 partition_point(i32 begin, i32 end, F before) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  while (begin < end) {
    const i32 step = (end - begin + 31) / 32, last = end - 1;
    const auto probe = [&](i32 n) { return min(begin + (n + 1) * step - 1, last); };
    const int passed = __popc(__ballot_sync(~0u, before(probe(lane))));
    if (passed < 32) end = probe(passed);
    if (passed > 0) begin = probe(passed - 1) + 1;
  }
  return begin;
}

/// The packed rows of a thread block.
struct BlockTile {
  i64 row, seq, kv_row, query_begin;
  i32 head_begin, heads, begin, end;  // packed rows [begin, end) of the row; empty where the row has fewer tiles
  i32 part;                           // of the keys
  i32 first_slot;                     // of the row's first query
  bool last_of_row;

  __device__ explicit BlockTile(const Job& job) {
    // Later tiles see more keys: they go first.
    i64 index = static_cast<i64>(gridDim.x) - 1 - blockIdx.x;
    part = static_cast<i32>(index % job.splits);
    index /= job.splits;
    row = job.row_begin + index / job.tiles_per_row;
    const i32 tile = static_cast<i32>(index % job.tiles_per_row);
    heads = job.heads;
    seq = job.rows.seq_of(row);
    head_begin = job.rows.head_of(row) * heads;
    kv_row = seq * job.layer.num_kv_heads + head_begin / job.layer.group();
    query_begin = job.rows.query_begin(row);
    const i32 packed = static_cast<i32>(job.rows.query_end(row) - query_begin) * heads;
    begin = min(tile * job.tile_rows, packed);
    end = min(begin + job.tile_rows, packed);
    last_of_row = end == packed;
    first_slot = static_cast<i32>(job.kv.length[kv_row] - job.q.count + query_begin);
  }

  __device__ i64 query(i32 packed) const { return query_begin + packed / heads; }
  __device__ i32 head(i32 packed) const { return head_begin + packed % heads; }
  __device__ i32 slot(i32 packed) const { return first_slot + packed / heads; }
};

/// The keys that a tile reads, in ascending slots: key n is entry n of a list, or slot first + n.
struct TileKeys {
  const i32* list = nullptr;
  const float* weight = nullptr;
  i32 first = 0, count = 0, exact_window = 0;

  /// Called by whole warps.
  __device__ TileKeys(const Job& job, const BlockTile& tile) {
    const i32 end = max(tile.slot(tile.end - 1) + 1, 0);  // no query of the tile sees slots from here on
    const i64 local = tile.row - job.row_begin;
    const i32 listed = job.lists.slot ? job.lists.count[local] : kFullRow;
    if (listed != kFullRow) {
      list = job.lists.slot + local * job.lists.stride;
      if (job.lists.weight) weight = job.lists.weight + local * job.lists.stride;
      if (job.exact_window) exact_window = job.exact_window[tile.row];
      const i32* entries = list;
      count =
          tile.last_of_row ? listed : partition_point(0, listed, [=](i32 n) { return (entries[n] & kSlotMask) < end; });
      return;
    }
    if (job.layer.sliding_window > 0 && end > 0) {
      const i32 slot = max(tile.slot(tile.begin), 0);
      const i64 oldest = job.kv.position_of(tile.kv_row, slot) - job.layer.sliding_window;
      first = partition_point(0, slot, [&](i32 n) { return job.kv.position_of(tile.kv_row, n) <= oldest; });
    }
    count = end - first;
  }

  __device__ i32 entry(i32 n) const { return n >= count ? kNoKey : list ? list[n] : first + n; }
};

/// A query's place on the scale of `until`: its original position where a sliding window is cut by position.
__device__ inline i32 clock_of(const Job& job, const BlockTile& tile, i32 slot) {
  return job.layer.sliding_window > 0 && slot >= 0 ? job.kv.position_of(tile.kv_row, slot) : slot;
}

/// First clock that no longer reads the key of this entry, in slot `physical` of the pool.
__device__ inline i32 until_of(const Job& job, const TileKeys& keys, i32 entry, i32 physical) {
  i64 until = kAlways;
  if (job.layer.sliding_window > 0)
    until = job.kv.position[physical] + job.layer.sliding_window;
  else if (entry < 0)
    until = static_cast<i64>(entry & kSlotMask) + keys.exact_window;
  return static_cast<i32>(min(until, static_cast<i64>(kAlways)));
}

/// Row of the results that a packed row fills.
__device__ inline i64 result_row(const Job& job, const BlockTile& tile, i32 packed) {
  const Results& r = job.results;
  const i64 part = static_cast<i64>(tile.part) * job.q.seqs;
  return ((part + tile.seq) * job.layer.num_qo_heads + tile.head(packed)) * r.queries + tile.query(packed) -
         r.first_query;
}

}  // namespace lacuna::cuda::attention
