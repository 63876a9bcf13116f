// Attention inside chunks of the prompt, where every query of a chunk sees every key of it, later ones too: a cheap
// measure of which tokens their neighbourhood attends to (kvpress' NonCausalAttnPress; Compactor).
//
//   A        = softmax of q . k (unscaled, keys after RoPE) over the keys of the query's chunk
//   mass(j)  = sum of A over the chunk's queries, reduced over the group
//   score(j) = mass(j) |v_j|, averaged over j - 1, j, j + 1 (zero padding counted)
//
// A partial last chunk has its own tokens only.
#pragma once

#include "lacuna/sdk/gqa.hpp"
#include "lacuna/sdk/reductions.hpp"

namespace lacuna::sdk {

/// Workspace of one call of chunk_attention for `rows` result rows of a layer with `query_heads` (sequence, head) rows.
inline i64 chunk_attention_bytes(i64 query_heads, i64 rows, i64 n) {
  return query_heads * n * 12 + 2 * 256 + 3 * (rows * n * 4 + 256) + rows * 4 + 256;
}

namespace detail {
/// Query heads against keys, chunk by chunk; slots are those of the query head's KV row.
struct ChunkLogits {
  Queries q;
  Paged kv;
  i64 group, chunk;
  Inner inner;

  LACUNA_HD i64 begin(i64 slot) const { return inner.first + (slot - inner.first) / chunk * chunk; }
  LACUNA_HD i64 end(i64 begin, i64 length) const {
    return begin + chunk < length - inner.last ? begin + chunk : length - inner.last;
  }
  LACUNA_HD double operator()(i64 head, i64 query_slot, i64 key_slot) const {
    const i64 row = head / group, i = kv.position_of(row, query_slot) - q.first_position;
    const i64 a = head / q.heads * q.seq_stride + head % q.heads * q.head_stride + i * q.row_stride;
    const i64 b = kv.physical(row, key_slot) * kv.head_dim;
    double sum = 0;
    for (i64 e = 0; e < kv.head_dim; ++e)
      sum += static_cast<double>(load(q.data, q.dtype, a + e)) * load(kv.k, kv.dtype, b + e);
    return sum;
  }
};
}  // namespace detail

/// Scores [rows.count(), kv.max_length] of the inner slots, chunks counted from inner.first; 0 elsewhere. `rows`: one
/// tile, of KV heads (the group reduced by `gqa`) or of query heads.
inline float* chunk_attention(Context& c, const Rows& rows, Gqa gqa, i64 chunk, Inner inner) {
  const Paged kv = c.kv();
  const Queries q = c.seen_queries();
  const i64 n = kv.max_length, group = c.layer().group(), heads = static_cast<i64>(q.seqs) * q.heads, d = kv.head_dim;
  const i32 heads_kv = c.layer().num_kv_heads;
  const detail::ChunkLogits logit{q, kv, group, chunk, inner};
  double* lse = c.workspace<double>(heads * n);
  c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
    const i64 head = i / n, slot = i % n, length = kv.length[head / group];
    if (!inner.holds(slot, length)) return;
    const i64 begin = logit.begin(slot), end = logit.end(begin, length);
    double most = -INFINITY, sum = 0;
    for (i64 j = begin; j < end; ++j) {
      const double x = logit(head, slot, j);
      if (x > most) {
        sum = sum * exp(most - x) + 1;
        most = x;
      } else {
        sum += exp(x - most);
      }
    }
    lse[i] = most + log(sum);
  });
  float* mass = c.workspace<float>(heads * n);
  c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
    const i64 head = i / n, slot = i % n, length = kv.length[head / group];
    if (!inner.holds(slot, length)) return;
    const i64 begin = logit.begin(slot), end = logit.end(begin, length);
    double sum = 0;
    for (i64 j = begin; j < end; ++j) sum += exp(logit(head, j, slot) - lse[head * n + j]);
    mass[i] = static_cast<float>(sum);
  });
  c.charge(2.0 * heads * n * d * size_of(q.dtype) + 2.0 * kv.rows * n * d * size_of(kv.dtype) + 12.0 * heads * n,
           4.0 * heads * n * chunk * d);

  const i64 count = rows.count();
  const float* reduced = mass;
  if (!rows.per_query_head) {
    float* out = c.workspace<float>(count * n);
    c.group_reduce(mass, out, n, n, reduce_of(gqa));
    reduced = out;
  }
  float* weighted = c.workspace<float>(count * n);
  i32* tokens = c.workspace<i32>(count);
  c.for_each(count * n, [=] LACUNA_HD(i64 i) {
    const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv), length = kv.length[kv_row];
    if (slot == 0) tokens[row] = static_cast<i32>(inner.count(length));
    if (!inner.holds(slot, length)) return;
    const i64 at = kv.physical(kv_row, slot) * d;
    double sum = 0;
    for (i64 e = 0; e < d; ++e) {
      const double v = load(kv.v, kv.dtype, at + e);
      sum += v * v;
    }
    weighted[i] = static_cast<float>(reduced[i] * sqrt(sum));
  });
  c.charge(1.0 * count * n * d * size_of(kv.dtype) + 8.0 * count * n, 2.0 * count * n * d);
  float* pooled = c.workspace<float>(count * n);
  if (inner.first < n)
    c.pool(weighted + inner.first, pooled + inner.first, static_cast<i32>(count), tokens, n, 3, Reduce::mean);
  return pooled;
}

}  // namespace lacuna::sdk
