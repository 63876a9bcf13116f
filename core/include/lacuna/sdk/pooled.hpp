// Mean queries of tiles against mean keys of blocks: the coarsest estimate of attention between them.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Workspace of one call of pooled_dots, in two arrays, for at most `length` tokens.
inline i64 pooled_dots_bytes(Context& c, i64 length, i32 q_tile, i32 block) {
  const Layer& l = c.layer();
  const i64 means = l.num_qo_heads * ((length + q_tile - 1) / q_tile) + l.num_kv_heads * ((length + block - 1) / block);
  return 4 * c.call().num_seqs * means * l.head_dim + 2 * 256;
}

/// value[row, unit] = mean query of the row's tile . mean key of the unit's `block` tokens, unscaled, for every unit
/// that the row sees (others stay as they are); a partial tile or block is padded with zeros. Rows are query heads.
inline void pooled_dots(Context& c, const Rows& rows, i32 block, float* value, i64 stride) {
  const Queries q = c.current_queries();
  const Paged kv = c.kv();
  const i32 kv_heads = c.layer().num_kv_heads;
  const i64 d = q.head_dim, tokens = block;
  const i64 tiles = (q.count + rows.q_tile - 1) / rows.q_tile, blocks = (kv.max_length + block - 1) / block;
  float* queries = c.workspace<float>(q.seqs * q.heads * tiles * d);
  float* keys = c.workspace<float>(kv.rows * blocks * d);
  c.mean_queries(q, rows.q_tile, true, queries);
  c.mean_keys(block, true, keys);
  c.for_each(rows.count() * blocks, [=] LACUNA_HD(i64 i) {
    const i64 row = i / blocks, unit = i % blocks;
    if (unit * tokens >= rows.first_position + rows.query_end(row)) return;
    const i64 head = static_cast<i64>(rows.seq_of(row)) * rows.heads + rows.head_of(row);
    const float *a = queries + (head * tiles + rows.tile_of(row)) * d,
                *b = keys + (rows.kv_row(row, kv_heads) * blocks + unit) * d;
    float sum = 0.f;
    for (i64 e = 0; e < d; ++e) sum += a[e] * b[e];
    value[row * stride + unit] = sum;
  });
  const double pairs = 0.5 * static_cast<double>(rows.count()) * static_cast<double>(blocks);
  c.charge(4.0 * d * (rows.count() + kv.rows * blocks) + 4.0 * pairs, 2.0 * d * pairs);
}

}  // namespace lacuna::sdk
