// Attention calls to time: one sequence in bf16 pages scattered over the pool, and the queries of its last tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <random>
#include <vector>

#include "lacuna/attention/attention.hpp"

namespace lacuna::bench {

using sdk::i32;
using sdk::i64;

constexpr i32 kHeadDim = 128, kPage = 16, kBlock = 64;

/// Standard normal, the same on any number of threads.
inline std::vector<float> random_floats(i64 n, unsigned seed) {
  constexpr i64 kChunk = 1 << 16;
  std::vector<float> out(static_cast<std::size_t>(n));
#pragma omp parallel for schedule(dynamic)
  for (i64 begin = 0; begin < n; begin += kChunk) {
    std::seed_seq seeds{seed, static_cast<unsigned>(begin / kChunk)};
    std::mt19937 rng(seeds);
    std::normal_distribution<float> normal;
    for (i64 i = begin; i < std::min(begin + kChunk, n); ++i) out[static_cast<std::size_t>(i)] = normal(rng);
  }
  return out;
}

inline std::vector<sdk::u16> to_bf16(const std::vector<float>& from) {
  std::vector<sdk::u16> out(from.size());
  std::transform(from.begin(), from.end(), out.begin(), sdk::to_bf16);
  return out;
}

struct Heads {
  i32 query, kv;
};

class AttentionProblem {
 public:
  AttentionProblem(Heads heads, i64 tokens, i64 count)
      : q(random_floats(heads.query * count * kHeadDim, 1)), length(heads.kv, static_cast<i32>(tokens)) {
    const i32 pages = static_cast<i32>((tokens + kPage - 1) / kPage);
    table.resize(static_cast<std::size_t>(pages * heads.kv));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(2));
    position.resize(table.size() * kPage);
    for (std::size_t p = 0; p < table.size(); ++p)
      for (i32 s = 0; s < kPage; ++s)
        position[static_cast<std::size_t>(table[p] * kPage + s)] = static_cast<i32>(p) % pages * kPage + s;
    k = to_bf16(random_floats(static_cast<i64>(position.size()) * kHeadDim, 3));
    v = to_bf16(random_floats(static_cast<i64>(position.size()) * kHeadDim, 4));
    const i64 row = kHeadDim, head = count * row;
    attention.layer = {0, 1, heads.query, heads.kv, kHeadDim, 1.f / std::sqrt(static_cast<float>(kHeadDim)), 0};
    attention.kv = {table.data(), length.data(), position.data(), k.data(), v.data(), sdk::Dtype::bf16,
                    heads.kv,     pages,         kPage,           kHeadDim, length[0]};
    attention.q = {q.data(),       sdk::Dtype::f32,    1,    heads.query, kHeadDim, count,
                   tokens - count, heads.query * head, head, row};
  }
  AttentionProblem(const AttentionProblem&) = delete;

  /// Queries in the cache's own dtype.
  void round_queries() {
    rounded = to_bf16(q);
    attention.q.data = rounded.data();
    attention.q.dtype = sdk::Dtype::bf16;
  }

  /// Keeps in each tile of kBlock queries its diagonal block and others at random, `density` of the visible ones.
  void select_blocks(double density) {
    std::mt19937 rng(5);
    const i32 tiles = static_cast<i32>((attention.q.count + kBlock - 1) / kBlock);
    const sdk::Rows rows{1, attention.layer.num_kv_heads, 0, tiles, kBlock, 0, attention.q.count, 0};
    const auto n = static_cast<std::size_t>(rows.count());
    counts.resize(n);
    zeros.assign(n, 0);
    pieces.assign(n * static_cast<std::size_t>(rows.tiles), 0);
    for (i64 r = 0; r < rows.count(); ++r) {
      std::vector<i32> blocks(static_cast<std::size_t>(rows.tile_of(r)));
      std::iota(blocks.begin(), blocks.end(), 0);
      std::shuffle(blocks.begin(), blocks.end(), rng);
      blocks.resize(static_cast<std::size_t>(std::max(0., std::round(density * (rows.tile_of(r) + 1)) - 1)));
      blocks.push_back(rows.tile_of(r));
      counts[static_cast<std::size_t>(r)] = static_cast<i32>(blocks.size());
      for (std::size_t b = 0; b < blocks.size(); ++b)
        pieces[static_cast<std::size_t>(r * rows.tiles) + b] = blocks[b] * kBlock;
    }
    selection = {rows,          kBlock,
                 rows.tiles,    0,
                 counts.data(), pieces.data(),
                 zeros.data(),  nullptr,
                 zeros.data(),  zeros.data(),
                 zeros.data(),  nullptr,
                 nullptr,       0,
                 nullptr,       nullptr,
                 nullptr,       nullptr};
    attention.read = &selection;
  }

  /// (query, key) pairs of all query heads that are read.
  double pairs() const {
    const sdk::Queries& queries = attention.q;
    const auto causal = [](i64 first, i64 end) {  // of queries at slots [first, end)
      return .5 * static_cast<double>(end - first) * static_cast<double>(first + end + 1);
    };
    if (!attention.read) return queries.heads * causal(length[0] - queries.count, length[0]);
    double sum = 0;
    for (i64 r = 0; r < selection.rows.count(); ++r) {
      const i64 n = selection.rows.query_end(r) - selection.rows.query_begin(r);
      sum += static_cast<double>(n) * kBlock * (counts[static_cast<std::size_t>(r)] - 1) + causal(0, n);
    }
    return sum * attention.layer.group();
  }

  std::vector<float> q;
  std::vector<i32> table, length, position, counts, zeros, pieces;
  std::vector<sdk::u16> rounded, k, v;
  sdk::Selection selection{};
  Attention attention{};
};

}  // namespace lacuna::bench
