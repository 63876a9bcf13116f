// Attention of a batch of queries over the paged cache: dense, or over a selection. The fp32 kernels (OpenMP,
// vectorised) and the fp64 oracle take the same arguments.
#pragma once

#include "lacuna/ops/row_set.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Query i of q sits at slot length - q.count + i of each KV head's row: the queries are the newest tokens of the
/// cache. Head h reads KV head h / group. Works for any head size, group and length.
struct Attention {
  sdk::Layer layer;
  sdk::Paged kv;
  sdk::Queries q;
  const sdk::Selection* read = nullptr;  // null: every visible slot
  bool ignore_weights = false;           // reads the selection's set without its log weights
  bool precise = false;                  // tensor cores: probabilities keep twice the bits, for measuring fidelity
};

/// Counts what the kernels did, for tests and cost accounting.
struct AttentionWork {
  sdk::i64 dense_rows = 0, sparse_rows = 0;  // (query head, query tile) rows through either path
  sdk::i64 pairs = 0;                        // (query, key) pairs computed, masked ones excluded
};

/// out [seqs, num_qo_heads, count, head_dim], lse [seqs, num_qo_heads, count]: natural log-sum-exp of the scaled logits
/// plus log weights. A query with no cell gives zeros and -inf. fp32 accumulation, the same bits on any number of
/// threads. Layers with a sliding window must be read densely (the window is applied by original position). A selection
/// of a range of tiles computes those tiles' queries and leaves the others as they are. Throws Error for shapes that do
/// not fit together.
AttentionWork attend(const Attention& a, float* out, float* lse);

/// The same in fp64, plain loops. pv_norm [heads, count] (or null): sum of p * ||v||, the scale of the error bound.
void attend_fp64(const Attention& a, double* out, double* lse, double* pv_norm);

/// mass [seqs, num_qo_heads, count]: the dense probability over the set that each query reads: sum of exp(logit -
/// dense_lse), accumulated in fp64, at most 1. `sets` per (query head, tile) in slots of this cache; q_tile as the
/// selection's.
void set_mass(const Attention& a, const std::vector<RowSet>& sets, sdk::i32 q_tile, const float* dense_lse,
              double* mass);

/// Merges two partial results over disjoint keys: the state (out, lse) is a commutative monoid with identity (0, -inf).
void merge(float* out, float* lse, const float* other_out, float other_lse, sdk::i32 head_dim);

}  // namespace lacuna
