// A tile of attention logits, kept in cache: queries of one KV head side by side in lanes, against keys taken from the
// pages 64 at a time. Attention and the operations that need softmax probabilities are loops over it; nothing of size
// queries x keys is ever stored.
#pragma once

#include <algorithm>
#include <vector>

#include "lacuna/ops/multiply.hpp"
#include "lacuna/ops/row_set.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Keys that a tile reads, ascending. A query at slot s reads key i iff slot[i] <= s < until[i].
struct KeyList {
  std::vector<sdk::i32> slot, until;
  std::vector<float> log_weight;  // empty: none

  sdk::i64 size() const { return static_cast<sdk::i64>(slot.size()); }
};

/// What the queries at slots [begin, end) of a KV row read densely: every slot up to their own, and with a sliding
/// window only those whose original position is less than `sliding_window` (0: none) before theirs.
KeyList dense_keys(const sdk::Paged& kv, sdk::i64 row, sdk::i64 begin, sdk::i64 end, sdk::i64 sliding_window);
/// What they read of a set.
KeyList set_keys(const RowSet& set, sdk::i64 begin, sdk::i64 end, bool weighted);

/// Queries [begin, end) of consecutive query heads that share a KV row.
struct TileQueries {
  sdk::i64 seq, begin, end;
  sdk::i32 head_begin, heads;
  sdk::i64 kv_row;

  sdk::i64 count() const { return end - begin; }
};

/// Scratch of one thread. Use: load_queries, then for every block of keys load_keys and, group by group, online or
/// probabilities. Logits are sums of fp32 products in fp32; where the norms of queries and keys allow a logit above 64
/// in magnitude the block is summed in fp64 (exact differences are what softmax sees), so that the error of a
/// probability stays below 1e-5 of itself whatever the model's scale.
class Tile {
 public:
  static constexpr int kKeys = 64;   // keys of a block
  static constexpr int kLanes = 64;  // lanes of a group

  /// `slots`: where each query of the tile sits in the KV row, ascending; -1: it sees no key. `scale` multiplies the
  /// logits.
  void load_queries(const sdk::Queries& q, const TileQueries& which, const std::vector<sdk::i32>& slots, double scale);
  /// Keys [begin, begin + n) of the list, n <= kKeys; with their values or without.
  void load_keys(const sdk::Paged& kv, const KeyList& keys, sdk::i64 begin, int n, bool values);

  int groups() const { return static_cast<int>(round_up<sdk::i64>(lanes_, kLanes) / kLanes); }
  int width(int group) const { return static_cast<int>(std::min<sdk::i64>(kLanes, padded_ - group * kLanes)); }
  /// Lane of query i (of the tile) of head h (of the tile).
  sdk::i64 lane(sdk::i64 h, sdk::i64 i) const { return h * head_stride_ + i; }

  /// Softmax step of the loaded keys: updates each lane's maximum and sum, and with values its output.
  void online(int group);
  /// exp(logit - lse) of the loaded keys into probability(); lse by lane, from finish() or set_lse().
  void probabilities(int group);
  /// probability()[key * width(group) + lane of the group]
  const float* probability() const { return p_.data(); }
  /// Adds to, or takes the maximum into, out[head * out_stride + key] over the queries of each head of the tile.
  void reduce(int group, bool maximum, double* out, sdk::i64 out_stride) const;

  /// The lanes' natural log-sum-exp after online(); -inf where a query read nothing. It becomes the lse of
  /// probabilities().
  const std::vector<double>& finish();
  void set_lse(sdk::i64 lane, double lse) { lse_[static_cast<std::size_t>(lane)] = lse; }
  /// Normalised output of a lane into out[head_dim]; after finish().
  void output(sdk::i64 lane, float* out) const;

 private:
  template <class T>
  void logits(int group, T* s);
  template <class T>
  void soften(int group, T* s);
  template <class T>
  void exponentiate(int group, const T* s);
  template <class T>
  void mask(int group, T* s) const;
  void widen_queries();

  TileQueries which_{};
  int head_dim_ = 0, depth_ = 0;  // depth_: head_dim padded to kRowStep
  sdk::i64 lanes_ = 0, padded_ = 0, head_stride_ = 0;
  double scale_ = 1, query_norm_ = 0;
  bool wide_queries_ready_ = false;
  std::vector<sdk::i32> lane_slot_;
  sdk::i32 first_slot_ = 0, last_slot_ = 0;
  std::vector<double> top_, sum_, lse_;  // by lane
  simd::Aligned<float> raw_q_, q_;       // group by group [depth_, width]; q_ scaled
  simd::Aligned<double> wide_q_;
  simd::Aligned<float> out_;  // group by group [depth_, width]

  // The loaded block.
  const KeyList* keys_ = nullptr;
  sdk::i64 key_begin_ = 0;
  int num_keys_ = 0;
  bool wide_ = false, values_ = false, masked_ = false;
  simd::Aligned<float> k_, v_;  // [kKeys, depth_]
  simd::Aligned<double> wide_k_;

  // One group of lanes against it.
  simd::Aligned<float> logits_, p_;  // [kKeys, width]
  simd::Aligned<double> wide_logits_;
  simd::Aligned<float> keep_;  // [width] what a new maximum leaves of the old sums
};

}  // namespace lacuna
