// The search for each head's pattern, on the host: how much of the true attention the candidates keep in one trace.
// Rules: minference.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/pooled.hpp>
#include <lacuna/sdk/slash.hpp>
#include <numeric>
#include <vector>

namespace minference {
using namespace lacuna::sdk;

inline constexpr i32 kTile = 64, kLastQueries = 64, kForcedColumns = 30, kForcedDiagonals = 100, kLeastDiagonals = 50;
inline constexpr i32 kOriginalForced = 30, kOriginalBlock = 32;  // search = original
inline constexpr i64 kFirstRow = 2500, kRowStep = 16;            // rows that are looked at

enum Kind : i32 { kSlash = 0, kShape = 1, kBlocks = 2 };

struct Pattern {
  i32 kind;
  i64 first, second;
};

/// Sizes, or where all cost the same their ratio; of blocks the share 1 / first.
struct Candidate {
  i32 kind;
  double first, second;
};
inline std::vector<Candidate> equal_cost_candidates() {
  return {{kShape, 100, 800},  {kSlash, 30, 800},    {kSlash, 100, 750}, {kSlash, 500, 700},
          {kSlash, 3500, 100}, {kSlash, 1000, 6096}, {kBlocks, 1, 0}};
}
inline std::vector<Candidate> original_candidates() {
  return {{kShape, 100, 800}, {kSlash, 30, 800},   {kSlash, 100, 750},
          {kSlash, 500, 700}, {kSlash, 3500, 100}, {kBlocks, 8, 0}};
}

template <class T>
auto& at(T& values, i64 i) {
  return values[static_cast<std::size_t>(i)];
}

/// Indices by descending value, ties to the lower one; the first `forced` stay in front.
inline std::vector<i32> best_first(const float* value, i64 n, i64 forced) {
  std::vector<i32> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin() + std::min(n, forced), order.end(), [&](i32 a, i32 b) { return value[a] > value[b]; });
  return order;
}
inline std::vector<i32> ascending(const std::vector<i32>& order, i64 count) {
  std::vector<i32> out(order.begin(), order.begin() + std::min(count, static_cast<i64>(order.size())));
  std::sort(out.begin(), out.end());
  return out;
}

/// What patterns are made of in one head of one trace.
struct SearchedHead {
  i64 length, block;                    // block: of block patterns, and the tile of queries that share a set
  bool lowered;                         // columns and diagonals as pieces, else as a token mask
  std::vector<i32> columns, diagonals;  // best first
  const float* block_scores;            // [blocks, blocks]

  i64 blocks() const { return (length + block - 1) / block; }
  SlashTile tile(i64 begin) const { return {begin, std::min(begin + block, length), block, block, false}; }

  /// (query, key) pairs that a pattern computes.
  double pairs(const Pattern& p) const {
    double sum = 0;
    if (p.kind == kShape)
      for (i64 i = 0; i < length; ++i) sum += static_cast<double>(std::min(i + 1, p.first + p.second));
    if (p.kind == kBlocks)
      for (i64 t = 0; t < blocks(); ++t)
        sum += static_cast<double>(std::min(p.first, t + 1) * block * std::min(block, length - t * block));
    if (p.kind != kSlash) return sum;
    const std::vector<i32> v = ascending(columns, p.first), s = ascending(diagonals, p.second);
    for (i64 begin = 0; begin < length; begin += block) {
      SlashLowering l{v.data(), s.data(), static_cast<i32>(v.size()), static_cast<i32>(s.size()), nullptr, nullptr};
      l.run(tile(begin));
      sum += static_cast<double>(l.pairs);
    }
    return sum;
  }

  /// A candidate's pattern with n units in all.
  static Pattern sized(const Candidate& c, i64 n) {
    const i64 first = std::llround(static_cast<double>(n) * c.first / (c.first + c.second));
    if (c.kind == kSlash)
      return {kSlash, std::max<i64>(first, kForcedColumns), std::max<i64>(n - first, kLeastDiagonals)};
    return {c.kind, first, c.kind == kShape ? std::max<i64>(n - first, 1) : 0};
  }
  Pattern largest(const Candidate& c, double most_pairs) const {
    i64 lo = 1, hi = 2 * length;
    while (lo < hi) {
      const i64 mid = (lo + hi + 1) / 2;
      if (pairs(sized(c, mid)) <= most_pairs)
        lo = mid;
      else
        hi = mid - 1;
    }
    return sized(c, lo);
  }
  Pattern original(const Candidate& c) const {
    if (c.kind == kBlocks) return {kBlocks, blocks() / static_cast<i64>(c.first), 0};
    return {c.kind, static_cast<i64>(c.first), static_cast<i64>(c.second)};
  }
};

/// The cells that a pattern reads, a tile of queries after the other.
class Reading {
 public:
  Reading(const SearchedHead& head, const Pattern& pattern)
      : head_(head),
        pattern_(pattern),
        window_(pattern.second + (head.lowered ? 0 : 1)) {  // the original's is one more
    if (pattern.kind != kSlash) return;
    columns_ = ascending(head.columns, pattern.first);
    diagonals_ = ascending(head.diagonals, pattern.second);
    if (head.lowered) return;
    mask_.assign(static_cast<std::size_t>(head.length), 0);
    offsets_ = mask_;
    for (const i32 j : columns_) at(mask_, j) = 1;
    for (const i32 o : diagonals_) at(offsets_, o) = 1;
  }

  void enter(i64 begin) {
    if (pattern_.kind == kShape || (pattern_.kind == kSlash && !head_.lowered)) return;
    mask_.assign(static_cast<std::size_t>(head_.length + 2 * head_.block), 0);
    if (pattern_.kind == kBlocks) {
      const i64 t = begin / head_.block;
      for (const i32 b : ascending(best_first(head_.block_scores + t * head_.blocks(), t + 1, 0), pattern_.first))
        std::fill_n(mask_.begin() + b * head_.block, head_.block, 1);
      return;
    }
    std::vector<i32> pieces(static_cast<std::size_t>(most_slash_pieces(head_.length, head_.block, head_.block)));
    std::vector<i32> tokens(columns_.size());
    SlashLowering l{
        columns_.data(), diagonals_.data(), static_cast<i32>(columns_.size()), static_cast<i32>(diagonals_.size()),
        pieces.data(),   tokens.data()};
    l.run(head_.tile(begin));
    for (i32 n = 0; n < l.num_pieces; ++n) std::fill_n(mask_.begin() + at(pieces, n), head_.block, 1);
    for (i32 n = 0; n < l.num_tokens; ++n) at(mask_, at(tokens, n)) = 1;
  }

  /// Of the probabilities p of the query at i.
  double kept(i64 i, const std::vector<double>& p) const {
    double sum = 0;
    for (i64 j = 0; j <= i; ++j) {
      const bool read = pattern_.kind == kShape ? j < pattern_.first || i - j < window_
                                                : at(mask_, j) || (!offsets_.empty() && at(offsets_, i - j));
      if (read) sum += at(p, j);
    }
    return sum;
  }

 private:
  const SearchedHead& head_;
  Pattern pattern_;
  i64 window_;
  std::vector<i32> columns_, diagonals_;
  std::vector<u8> mask_, offsets_;  // by token; by offset
};

/// Causal softmax of one query of a head over its keys [length, d].
inline void probabilities(const Queries& q, i64 head, i64 i, const std::vector<float>& keys, float scale,
                          std::vector<double>& p) {
  const i64 d = q.head_dim;
  std::vector<float> query(static_cast<std::size_t>(d));
  for (i64 e = 0; e < d; ++e) at(query, e) = q.at(0, head, i, e) * scale;
  double top = -INFINITY, sum = 0;
  for (i64 j = 0; j <= i; ++j) {
    float logit = 0;
    for (i64 e = 0; e < d; ++e) logit += at(query, e) * at(keys, j * d + e);
    at(p, j) = static_cast<double>(logit);
    top = std::max(top, at(p, j));
  }
  for (i64 j = 0; j <= i; ++j) sum += at(p, j) = std::exp(at(p, j) - top);
  for (i64 j = 0; j <= i; ++j) at(p, j) /= sum;
}

/// Adds to sums [patterns, 3] the mean mass that each pattern keeps in the head's rows, and its sizes.
inline void search_head(Context& c, const Queries& q, i64 head, const SearchedHead& searched,
                        const std::vector<Pattern>& patterns, double* sums) {
  const Paged kv = c.kv();
  const i64 n = searched.length, d = q.head_dim, row = head / c.layer().group();
  std::vector<float> keys(static_cast<std::size_t>(n * d));
  for (i64 i = 0; i < n * d; ++i) at(keys, i) = kv.key(row, i / d, i % d);
  std::vector<Reading> readings;
  for (const Pattern& p : patterns) readings.emplace_back(searched, p);
  std::vector<double> p(static_cast<std::size_t>(n)), kept(patterns.size(), 0.);
  const i64 from = std::min(kFirstRow, n / 2);
  i64 rows = 0, entered = -1;
  for (i64 i = from; i < n; i += kRowStep, ++rows) {
    if (const i64 tile = i / searched.block; tile != entered) {
      for (Reading& reading : readings) reading.enter(tile * searched.block);
      entered = tile;
    }
    probabilities(q, head, i, keys, c.layer().softmax_scale, p);
    for (std::size_t k = 0; k < readings.size(); ++k) kept[k] += readings[k].kept(i, p);
  }
  for (std::size_t k = 0; k < patterns.size(); ++k) {
    sums[k * 3] += kept[k] / static_cast<double>(rows);
    sums[k * 3 + 1] += static_cast<double>(patterns[k].first);
    sums[k * 3 + 2] += static_cast<double>(patterns[k].second);
  }
}

/// Adds every candidate in every head of the call's trace to sums [heads, candidates, 3]: mass, first and second size.
inline void search_trace(Context& c, const std::vector<Candidate>& candidates, bool original, double density,
                         double* sums) {
  const Queries q = c.current_queries();
  const i64 n = q.count, block = original ? kOriginalBlock : kTile, blocks = (n + block - 1) / block;
  const auto floats = [](i64 size) { return std::vector<float>(static_cast<std::size_t>(size)); };
  std::vector<float> column = floats(q.heads * n), diagonal = floats(q.heads * n);
  std::vector<float> scores = floats(q.heads * blocks * blocks);
  c.window_mass(c.last_queries(kLastQueries), Reduce::sum, column.data(), diagonal.data(), n);
  const Rows rows{1, q.heads, 0, static_cast<i32>(blocks), static_cast<i32>(block), 1, n, q.first_position};
  pooled_dots(c, rows, static_cast<i32>(block), scores.data(), blocks);
  const double most_pairs = density * .5 * static_cast<double>(n) * static_cast<double>(n + 1);
  for (i64 head = 0; head < q.heads; ++head) {
    const SearchedHead searched{
        n,
        block,
        !original,
        best_first(column.data() + head * n, n, kForcedColumns),
        best_first(diagonal.data() + head * n, n, original ? kOriginalForced : kForcedDiagonals),
        scores.data() + head * blocks * blocks};
    std::vector<Pattern> patterns;
    for (const Candidate& candidate : candidates)
      patterns.push_back(original ? searched.original(candidate) : searched.largest(candidate, most_pairs));
    search_head(c, q, head, searched, patterns, sums + head * static_cast<i64>(patterns.size()) * 3);
  }
}

}  // namespace minference
