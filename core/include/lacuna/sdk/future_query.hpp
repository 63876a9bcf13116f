// The query that the positions after the prompt are expected to ask: the mean of the prompt's queries before RoPE,
// under the mean rotation of the positions to come.
#pragma once

#include "lacuna/sdk/reductions.hpp"

namespace lacuna::sdk {

/// Workspace of one call of future_query; `queries`: the most that can have been seen.
inline i64 future_query_bytes(i64 heads, i64 queries, i64 d, i64 future) {
  return row_sums_bytes(heads, queries, d) + heads * d * 8 + future * d * 4 + d * 8 + 3 * 256;
}

/// Queries before RoPE at or after position `begin`, less their mean where there is one; 0 elsewhere.
struct PromptQueries {
  Queries q;
  i64 begin;
  const double* mean;  // [heads, d], or null

  LACUNA_HD i64 count() const {
    const i64 end = q.first_position + q.count, from = begin > q.first_position ? begin : q.first_position;
    return end > from ? end - from : 0;
  }
  LACUNA_HD double operator()(i64 row, i64 i, i64 e) const {
    if (q.first_position + i < begin) return 0;
    const double x = q.at(row / q.heads, row % q.heads, i, e);
    return mean ? x - mean[row * q.head_dim + e] : x;
  }
};

/// The mean over positions of RoPE's rotations: pairs of channels c, c + d / 2.
struct MeanRotation {
  const double* turn;  // [d] mean cosines, then mean sines
  i64 half;

  /// Channel e of the rotated vector is of(e, 0) x[e] + of(e, 1) x[partner(e)].
  LACUNA_HD i64 partner(i64 e) const { return e < half ? e + half : e - half; }
  LACUNA_HD double of(i64 e, i64 which) const {
    if (which == 0) return turn[e % half];
    return e < half ? -turn[half + e] : turn[e];
  }
};

struct FutureQuery {
  PromptQueries queries;  // centred
  MeanRotation rotation;
  const double* mean;  // [heads, d] rotated
};

/// `heads` are (sequence, query head) rows; queries before position `begin` are left out; `future` positions follow the
/// last query.
inline FutureQuery future_query(Context& c, i64 begin, i64 future) {
  const Queries q = c.unrotated_seen_queries();
  const i64 heads = static_cast<i64>(q.seqs) * q.heads, d = q.head_dim;
  PromptQueries queries{q, begin, nullptr};
  double* mean = row_sums(c, heads, q.count, d, queries);
  const double share = queries.count() > 0 ? 1.0 / static_cast<double>(queries.count()) : 0.0;
  c.for_each(heads * d, [=] LACUNA_HD(i64 i) { mean[i] *= share; });
  queries.mean = mean;

  float* angles = c.workspace<float>(future * d);
  c.rotations(q.first_position + q.count, future, angles);
  double* turn = c.workspace<double>(d);
  c.for_each(d, [=] LACUNA_HD(i64 e) {
    for (i64 i = 0; i < future; ++i) turn[e] += angles[i * d + e];
    turn[e] /= static_cast<double>(future);
  });
  const MeanRotation rotation{turn, d / 2};
  double* rotated = c.workspace<double>(heads * d);
  c.for_each(heads * d, [=] LACUNA_HD(i64 i) {
    const i64 e = i % d;
    rotated[i] = rotation.of(e, 0) * mean[i] + rotation.of(e, 1) * mean[i - e + rotation.partner(e)];
  });
  c.charge(4.0 * (heads * q.count + future) * d, 1.0 * future * d);
  return {queries, rotation, rotated};
}

}  // namespace lacuna::sdk
