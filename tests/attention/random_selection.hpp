// Generated input: positions of an evicted row, and selections with everything that they may hold.
#pragma once

#include <algorithm>
#include <iterator>
#include <random>
#include <vector>

#include "attention/paged_fixture.hpp"

namespace lacuna::test {

// Increasing positions with gaps, the last `recent` of them consecutive up to `end`.
inline std::vector<i32> evicted(i64 kept, i64 recent, i64 end, unsigned seed) {
  std::vector<i32> all = consecutive(end - recent), out;
  std::sample(all.begin(), all.end(), std::back_inserter(out), kept - recent, std::mt19937(seed));
  for (i64 p = end - recent; p < end; ++p) out.push_back(static_cast<i32>(p));
  return out;
}

inline SelectionFixture random_selection(i32 seqs, i32 heads, bool per_query_head, i32 q_tile, i64 count,
                                         i64 least_length, bool weighted, unsigned seed) {
  std::mt19937 rng(seed);
  const auto below = [&](i64 n) { return static_cast<i32>(rng() % static_cast<unsigned>(n)); };
  const sdk::Rows rows = rows_of(seqs, heads, per_query_head, q_tile, count, least_length - count);
  std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
  for (auto& row : content) {
    for (i32 n = below(5); n > 0; --n) row.pieces.push_back(below(least_length));  // unaligned, may overlap
    for (i32 n = below(40); n > 0; --n) row.tokens.push_back(below(least_length));
    std::sort(row.tokens.begin(), row.tokens.end());
    row.tokens.erase(std::unique(row.tokens.begin(), row.tokens.end()), row.tokens.end());
    std::sort(row.pieces.begin(), row.pieces.end());
    row.pieces.erase(std::unique(row.pieces.begin(), row.pieces.end()), row.pieces.end());
    std::shuffle(row.pieces.begin(), row.pieces.end(), rng);
    std::shuffle(row.tokens.begin(), row.tokens.end(), rng);
    for (std::size_t n = 0; n < row.pieces.size(); ++n)
      row.piece_weight.push_back(static_cast<float>(below(100)) / 20.f - 2.f);
    for (std::size_t n = 0; n < row.tokens.size(); ++n)
      row.token_weight.push_back(static_cast<float>(below(100)) / 20.f - 2.f);
    if (below(3) == 0) row.sinks = 1 + below(6);
    if (below(3) == 0) row.window = 1 + below(90);
    if (below(8) == 0) row.full = 1;
  }
  return SelectionFixture(rows, 24, std::move(content), weighted);
}

}  // namespace lacuna::test
