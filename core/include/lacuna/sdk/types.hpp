// Plain data that crosses the plug-in boundary, and the host-device helpers that read it.
// No std:: type, exception or allocation appears here; every struct may only grow at its end (ABI minor).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LACUNA_HD __host__ __device__
#else
#define LACUNA_HD
#endif

namespace lacuna::sdk {

using i32 = std::int32_t;
using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

enum class Phase : i32 { prefill, decode };
enum class Purpose : i32 { select, evict };

/// Element types of arrays. `u16` and `u8` hold codes and hashes.
enum class Dtype : i32 { f32, f16, bf16, i32, u16, u8 };

/// What a score means. Only `mass` (>= 0, a row sums to at most 1) may be cut by top-p; `logit` and `mass` may be
/// compared between rows when the method declares `comparable_across_heads`; `rank` only orders one row.
enum class ScoreKind : i32 { rank, logit, mass };

/// How a row's set is decided. `ranked`: top-k on its scores. `full`: everything visible. `window`: sinks and recent
/// tokens only (Budget::window_sinks, Budget::window_recent). `none`: nothing beyond the forced units.
enum class Rule : i32 { ranked, full, window, none };

/// How the query heads of a GQA group share a decision.
enum class Gqa : i32 { none, mean, max, sum, union_ };

enum class Reduce : i32 { sum, mean, max };

LACUNA_HD inline i64 size_of(Dtype t) { return t == Dtype::f32 || t == Dtype::i32 ? 4 : t == Dtype::u8 ? 1 : 2; }

LACUNA_HD inline float float_of_bits(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
LACUNA_HD inline u32 bits_of_float(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  return bits;
}
LACUNA_HD inline float from_bf16(u16 h) { return float_of_bits(static_cast<u32>(h) << 16); }

/// Round to nearest even; NaN stays NaN.
LACUNA_HD inline u16 to_bf16(float f) {
  const u32 x = bits_of_float(f);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((x >> 16) | 0x40u);
  return static_cast<u16>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

LACUNA_HD inline float from_f16(u16 h) {
  const u32 sign = static_cast<u32>(h & 0x8000u) << 16;
  const u32 exponent = (h >> 10) & 31u;
  const u32 mantissa = h & 1023u;
  if (exponent == 31u) return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0u) return float_of_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}

/// Round to nearest even, overflow to infinity; NaN stays NaN.
LACUNA_HD inline u16 to_f16(float f) {
  const u32 x = bits_of_float(f);
  const u32 sign = (x >> 16) & 0x8000u;
  const u32 a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<u16>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<u16>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal half: one fp32 addition rounds at the right bit
    const float shifted = float_of_bits(a) + 0.5f;
    return static_cast<u16>(sign | (bits_of_float(shifted) - 0x3f000000u));
  }
  const u32 rounded = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<u16>(sign | ((rounded - 0x38000000u) >> 13));
}

LACUNA_HD inline float load(const void* base, Dtype t, i64 i) {
  switch (t) {
    case Dtype::f32: return static_cast<const float*>(base)[i];
    case Dtype::bf16: return from_bf16(static_cast<const u16*>(base)[i]);
    case Dtype::f16: return from_f16(static_cast<const u16*>(base)[i]);
    case Dtype::i32: return static_cast<float>(static_cast<const i32*>(base)[i]);
    case Dtype::u16: return static_cast<float>(static_cast<const u16*>(base)[i]);
    case Dtype::u8: return static_cast<float>(static_cast<const u8*>(base)[i]);
  }
  return 0.f;
}

/// The layer that the call is about. `index` is the model's own layer number, never the position in a capture.
struct Layer {
  i32 index, num_layers, num_qo_heads, num_kv_heads, head_dim;
  float softmax_scale;
  i64 sliding_window;  // 0: none

  LACUNA_HD i32 group() const { return num_qo_heads / num_kv_heads; }
};

/// A dense array of at most four dimensions; strides in elements. Lives in device memory iff the call runs on a device.
struct Array {
  void* data;
  Dtype dtype;
  i32 rank;
  i64 extent[4];
  i64 stride[4];
};

/// The paged KV cache of one layer. A row is (sequence, KV head): row = sequence * num_kv_heads + head.
/// Slots 0..length-1 of a row are the cached tokens in ascending original position; there are no holes.
struct Paged {
  const i32* table;     // [rows, max_pages] physical page of each logical page
  const i32* length;    // [rows] cached tokens
  const i32* position;  // [pool pages, page_size] original position of each slot
  const void* k;        // [pool pages, page_size, head_dim]
  const void* v;        // [pool pages, page_size, head_dim]
  Dtype dtype;
  i32 rows, max_pages, page_size, head_dim;
  i32 max_length;  // host-known upper bound of length[]

  LACUNA_HD i64 physical(i64 row, i64 slot) const {
    return static_cast<i64>(table[row * max_pages + slot / page_size]) * page_size + slot % page_size;
  }
  LACUNA_HD i32 position_of(i64 row, i64 slot) const { return position[physical(row, slot)]; }
  LACUNA_HD float key(i64 row, i64 slot, i64 c) const { return load(k, dtype, physical(row, slot) * head_dim + c); }
  LACUNA_HD float value(i64 row, i64 slot, i64 c) const { return load(v, dtype, physical(row, slot) * head_dim + c); }
  /// Number of slots of `row` whose original position is at most `position` (what a query there may see).
  LACUNA_HD i32 visible(i64 row, i64 at) const {
    i32 lo = 0, hi = length[row];
    while (lo < hi) {
      const i32 mid = (lo + hi) / 2;
      if (position_of(row, mid) <= at)
        lo = mid + 1;
      else
        hi = mid;
    }
    return lo;
  }
};

/// Queries of the layer, consecutive positions, oldest first. Element (seq, head, i, c) has original position
/// first_position + i in its sequence.
struct Queries {
  const void* data;
  Dtype dtype;
  i32 seqs, heads, head_dim;
  i64 count, first_position;
  i64 seq_stride, head_stride, row_stride;

  LACUNA_HD float at(i64 seq, i64 head, i64 i, i64 c) const {
    return load(data, dtype, seq * seq_stride + head * head_stride + i * row_stride + c);
  }
};

/// The rows of a score, budget or selection: (sequence, head, query tile). The core may call by ranges of tiles;
/// tile t holds the queries [t * q_tile, min((t + 1) * q_tile, num_queries)) of the call. Decode and eviction: one
/// tile.
struct Rows {
  i32 seqs, heads, tile_begin, tiles, q_tile;
  i32 per_query_head;  // 1: heads are query heads; 0: KV heads
  i64 num_queries;     // queries of the whole call, all tiles
  i64 first_position;  // original position of query 0

  LACUNA_HD i64 count() const { return static_cast<i64>(seqs) * heads * tiles; }
  LACUNA_HD i32 tile_of(i64 row) const { return tile_begin + static_cast<i32>(row % tiles); }
  LACUNA_HD i32 head_of(i64 row) const { return static_cast<i32>(row / tiles % heads); }
  LACUNA_HD i32 seq_of(i64 row) const { return static_cast<i32>(row / tiles / heads); }
  LACUNA_HD i64 query_begin(i64 row) const { return static_cast<i64>(tile_of(row)) * q_tile; }
  LACUNA_HD i64 query_end(i64 row) const {
    const i64 e = query_begin(row) + q_tile;
    return e < num_queries ? e : num_queries;
  }
  /// Row of the paged cache that this row reads, for a layer of `num_kv_heads`.
  LACUNA_HD i64 kv_row(i64 row, i32 num_kv_heads) const {
    const i32 group = heads / num_kv_heads;
    return static_cast<i64>(seq_of(row)) * num_kv_heads + head_of(row) / group;
  }
};

/// Scores to fill: value[row * stride + unit], unit = `unit_tokens` consecutive slots of the row's KV head.
/// Higher is better; -inf: not a candidate; +inf: taken first, inside the budget; NaN is a contract breach.
/// The core has filled the array with -inf; units that lie wholly after the tile's last query are ignored.
struct Scores {
  Rows rows;
  float* value;
  i64 stride;  // elements between rows, >= units
  i32 units;   // candidate units a row at most (host-known)
  i32 unit_tokens;
  i64 budget_tokens;  // mean target of a row in tokens before allocation; -1: no budget was given
};

/// Target of each row. In prefill a row's target is `pairs` (query, key) pairs, `tokens` is its K_t; in decode and
/// eviction both count tokens. An allocator may move pairs between rows; the core checks the sum.
struct Budget {
  Rows rows;
  i64* tokens;         // [rows]
  i64* pairs;          // [rows]
  i32* rule;           // [rows] Rule
  i32* window_sinks;   // [rows] for Rule::window
  i32* window_recent;  // [rows] for Rule::window
  i32 limited;         // 0: no budget was given, the method uses its own count or threshold
  i32 sinks, recent;   // tokens that the scenario or the rule forces, inside the target
  double density;      // as the scenario gave it; 0: the budget is not a density
  i64 mean_tokens;     // since ABI 1.2; eviction: mean target of a row before allocation; -1: no budget was given
};

/// The set that each row reads, as a union; a token listed twice is read and charged once. Indices are slots. A role
/// that fills it finds counts, exact parts, `full` and log weights 0, and lists uninitialised.
struct Selection {
  Rows rows;
  i32 kv_block;                        // tokens of a piece; 0 when there are none
  i32 piece_capacity, token_capacity;  // a row's room, fixed by plan()
  i32 *piece_count, *pieces;  // [rows], [rows, piece_capacity]: first slot of kv_block consecutive ones, aligned or not
  i32 *token_count, *tokens;  // [rows], [rows, token_capacity]
  i32 *exact_sinks,
      *exact_window;  // [rows] besides: cells with slot < sinks, or query slot - slot < window, cut exactly
  i32* full;          // [rows] 1: every visible cell, whatever else is listed
  float *piece_log_weight, *token_log_weight;  // null, or added to the logits (importance sampling)
  // Since ABI 1.2: tokens that are in no cache and are attended to besides, as if a query saw each of them once with
  // exp(extra_log_weight) times its share (a cluster's centroid that stands for its keys). They read no cached token:
  // budgets and mass kept do not count them.
  i32 extra_capacity;        // a row's room, Plan::max_extras; 0: none
  i32* extra_count;          // [rows]
  float *extra_k, *extra_v;  // [rows, extra_capacity, head_dim]
  float* extra_log_weight;   // [rows, extra_capacity]
};

/// What a selection of `retain` must hold: rows are KV heads, one tile, tokens only.
struct Kept {
  Selection set;
};

/// What an eviction leaves in the tokens that it keeps. Rows are KV heads. `k` and `v` hold every cached token by its
/// slot before compaction; what a strategy writes to kept slots goes to the sequence's own cache (rounded to its type),
/// the rest is dropped.
struct Rewrite {
  i32 rows, head_dim;
  i64 slots;                    // elements between rows of k, v and kept, over head_dim for k and v
  const i32* kept_count;        // [rows]
  const i32* kept;              // [rows, slots] ascending slots that stay
  float *k, *v;                 // [rows, slots, head_dim] keys after RoPE
  i32* channels_dropped_until;  // [rows] keys at slots below it lose the channels named next; 0: none
  u8* drop_channel;             // [rows, head_dim] 1: this channel of those keys is not kept (read as 0, not counted)
};

/// Units whose side data must be brought up to date: units [begin[row], end[row]) of each KV row.
struct Dirty {
  i32 rows;
  i32 unit_tokens;
  const i32 *begin, *end;  // [rows]
  i32 max_units;           // host-known maximum of end - begin
};

/// What attention read and produced. `read` null: every visible token.
struct Attended {
  const Selection* read;
  Queries queries;
  const float* out;  // [seqs, num_qo_heads, queries, head_dim]
  const float* lse;  // [seqs, num_qo_heads, queries] natural log-sum-exp of the scaled logits
};

/// For allocate_layers: host arrays over the model's layers.
struct LayerBudget {
  i32 num_layers;
  i64 mean_tokens;    // uniform target of a head, forced tokens included
  i64 cached_tokens;  // tokens before the cut
  i64 forced_tokens;  // the scorer's forced window
  double* tokens;     // [num_layers] in: mean_tokens everywhere; out: this layer's target of a head
  // Since ABI 1.2. Mean entropy (nats) of the dense attention rows of each layer's prompt queries, over heads; null
  // unless the strategy declares kNeedsStatistics.
  const double* entropy;
};

enum class SidePer : i32 { token, unit };

/// Strategy-owned data beside the KV pages, per token or per `unit_tokens` consecutive slots of a KV head; allocated,
/// moved, forked and counted by the core. `moves`: a per-token side is carried along on compaction; otherwise, and for
/// unit sides, the moved units are reported dirty.
struct Side {
  const char* name;
  SidePer per;
  i32 unit_tokens;
  Dtype dtype;
  i64 elements;
  i32 moves;
};

/// Arrays that survive between calls, per (sequence, layer): zero-filled at the start.
struct State {
  const char* name;
  Dtype dtype;
  i64 elements;
};

/// Filled by plan() once per shape. The core sets the defaults shown; sinks and recent come from the parameters.
struct Plan {
  i32 q_tile;       // prefill query tile; 1 in decode whatever is set here
  i32 unit_tokens;  // tokens of a ranked unit; kv_block of the pieces; what retain() keeps or drops together
  ScoreKind score_kind;
  i32 per_query_head;           // 1: score() fills query-head rows and the core reduces by gqa; 0: KV-head rows
  i32 sinks, recent;            // forced tokens
  i32 first_units, last_units;  // forced units: the first ones, and the diagonal's or current one and those before it
  i32 min_units;                // least units of a row, forced ones included
  i64 max_pieces, max_tokens;   // a row's room in explicit selections; -1: as many as there can be
  i32 weighted;                 // 1: mark() or refine() writes log weights
  i32 evict_every;              // 0: once at the cut; n: also every n decode steps; a wrapper starts from its base's
  double threshold;             // top-p of score kind mass when no budget is given; < 0: none
  i64 default_units;            // ranked units when no budget is given (forced ones included); < 0: none
  i64 workspace_bytes;          // what workspace() may carve in one call, alignment not counted; at most 64 arrays
  i64 max_cached;               // in: longest cache in tokens that this run will see
  i64 budget_tokens;            // in: target tokens of a row if set directly, else -1
  i32 num_sides, num_states;
  Side sides[8];
  State states[8];
  i64 max_extras;  // since ABI 1.2: a row's room for Selection::extra_*; 0: none
};

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The core keys it by
/// (seed, model layer, step); a draw is addressed by (row, counter), so results do not depend on the order of calls.
struct Random {
  u64 key, step;

  LACUNA_HD u64 bits(u64 row, u64 counter) const {
    u32 c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32);
    u32 c2 = static_cast<u32>(row), c3 = static_cast<u32>(row >> 32) ^ static_cast<u32>(step);
    u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const u64 p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
      const u32 n0 = static_cast<u32>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<u32>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<u32>(p1);
      c3 = static_cast<u32>(p0);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return (static_cast<u64>(c1) << 32) | c0;
  }
  /// In [0, 1), 24 bits.
  LACUNA_HD float uniform(u64 row, u64 counter) const {
    return static_cast<float>(bits(row, counter) >> 40) * 5.9604644775390625e-8f;
  }
  /// Standard normal (Box-Muller, in double, so that host and device agree to rounding).
  LACUNA_HD float normal(u64 row, u64 counter) const {
    const u64 b = bits(row, counter);
    const double u = (static_cast<double>(static_cast<u32>(b)) + 1.0) * 2.3283064365386963e-10;
    const double w = static_cast<double>(static_cast<u32>(b >> 32)) * 2.3283064365386963e-10;
    return static_cast<float>(sqrt(-2.0 * log(u)) * cos(6.283185307179586476925 * w));
  }
};

/// An error on its way across the boundary; code 0 means none.
struct Error {
  i32 code;
  char text[1024];
};

}  // namespace lacuna::sdk
