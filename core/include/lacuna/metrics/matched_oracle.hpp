// `oracle_matched`: the most dense probability that any set could have read with the pairs that a method realised.
// Regret = that minus the method's own mass. Bound and proof: docs/metrics.md.
#pragma once

#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/ops/row_set.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// What one method realised, per row = (sequence * num_qo_heads + head) * tiles + tile.
struct OracleRequest {
  std::vector<sdk::i64> pairs;                      // (query, key) pairs read
  std::vector<sdk::i32> exact_sinks, exact_window;  // its exact cells; empty: none in any row
};

/// The request of a method that read `sets` (as set_mass takes them).
OracleRequest oracle_request(const Attention& a, const std::vector<RowSet>& sets, sdk::i32 q_tile);

/// mass [method][row]: the largest sum over the row's queries of the dense probability within the row's pairs, over
/// sets of columns (a key for all queries of the tile that see it) or, where the method has an exact window, over its
/// exact cells plus columns; the last column is taken in part, so this is an upper bound. a.read is not used; the layer
/// has no sliding window. dense_lse as attend() gives it. fp32 probabilities, fp64 sums; OpenMP over KV heads and
/// tiles, the same bits on any number of threads and whichever methods are asked together. Memory: a few vectors of the
/// cache's length for each head of a group, a thread.
std::vector<std::vector<double>> matched_oracle(const Attention& a, sdk::i32 q_tile, const float* dense_lse,
                                                const std::vector<OracleRequest>& requests);

/// Regret samples [heads, queries] of one method: (oracle mass of the row - its mass_kept) / its queries, for each
/// query of the row. Below zero by rounding only.
void regret_of_rows(const std::vector<double>& oracle, const double* mass_kept, sdk::i32 heads, sdk::i64 queries,
                    sdk::i32 q_tile, double* regret);

/// Eviction. The cache is the dense one; its slots before `cut` could be evicted, and a.q are the queries after the
/// cut, (all of them at slots >= cut). kept [method][sequence * num_kv_heads + KV head]: tokens before the cut that the
/// method keeps. Returns mass [method][heads * queries]: what each query would read if each KV head kept the tokens
/// with the largest mass over all of its group's queries (ties to the lower slot), later tokens included. Summed over a
/// KV head's queries no choice of as many tokens reads more.
std::vector<std::vector<double>> matched_evict_oracle(const Attention& a, sdk::i64 cut, const float* dense_lse,
                                                      const std::vector<std::vector<sdk::i64>>& kept);

}  // namespace lacuna
