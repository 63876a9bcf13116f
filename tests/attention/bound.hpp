// The bound that fp32 attention must meet, and a brute-force reference of the tests' own.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "attention/paged_fixture.hpp"
#include "lacuna/attention/attention.hpp"

namespace lacuna::test {

constexpr float kUnwritten = 77.f;

struct Result {
  std::vector<float> out, lse;
  AttentionWork work;
};

inline Result run(const Attention& a) {
  const auto rows = static_cast<std::size_t>(a.q.seqs * a.q.heads * a.q.count);
  Result r{std::vector<float>(rows * static_cast<std::size_t>(a.q.head_dim), kUnwritten),
           std::vector<float>(rows, kUnwritten),
           {}};
  r.work = attend(a, r.out.data(), r.lse.data());
  return r;
}

struct Reference {
  std::vector<double> out, lse, pv_norm;
};

inline Reference oracle(const Attention& a) {
  const auto rows = static_cast<std::size_t>(a.q.seqs * a.q.heads * a.q.count);
  Reference r{std::vector<double>(rows * static_cast<std::size_t>(a.q.head_dim)), std::vector<double>(rows),
              std::vector<double>(rows)};
  attend_fp64(a, r.out.data(), r.lse.data(), r.pv_norm.data());
  return r;
}

/// What query i of `head` reads: slot -> log weight; straight from the selection's definition.
inline std::vector<std::pair<i64, double>> cells_of(const Attention& a, i64 seq, i64 head, i64 i) {
  const i64 kv_head = head / a.layer.group(), row = seq * a.layer.num_kv_heads + kv_head,
            slot = a.kv.length[row] - a.q.count + i;
  std::vector<std::pair<i64, double>> out;
  for (i64 j = 0; j <= slot; ++j) {
    if (!a.read) {
      if (a.layer.sliding_window == 0 ||
          a.kv.position_of(row, slot) - a.kv.position_of(row, j) < a.layer.sliding_window)
        out.push_back({j, 0});
      continue;
    }
    const sdk::Selection& s = *a.read;
    const i64 r = (seq * s.rows.heads + (s.rows.per_query_head ? head : kv_head)) * s.rows.tiles + i / s.rows.q_tile;
    bool in = s.full[r] || j < s.exact_sinks[r] || slot - j < s.exact_window[r];
    double weight = 0;
    i64 best = -1;
    for (i64 t = r * s.token_capacity; t < r * s.token_capacity + s.token_count[r]; ++t)
      if (s.tokens[t] == j) {
        in = true;
        weight = s.token_log_weight ? s.token_log_weight[t] : 0;
      }
    for (i64 p = r * s.piece_capacity; p < r * s.piece_capacity + s.piece_count[r]; ++p)
      if (j >= s.pieces[p] && j < s.pieces[p] + s.kv_block && (best < 0 || s.pieces[p] < s.pieces[best])) {
        in = true;
        best = p;
      }
    if (best >= 0) weight = s.piece_log_weight ? s.piece_log_weight[best] : 0;
    if (in) out.push_back({j, s.full[r] || a.ignore_weights ? 0 : weight});
  }
  return out;
}

/// One query by brute force: out, lse and sum of p * ||v||.
inline Reference brute_force(const Attention& a, i64 seq, i64 head, i64 i) {
  const i64 row = seq * a.layer.num_kv_heads + head / a.layer.group(), d = a.q.head_dim;
  const auto cells = cells_of(a, seq, head, i);
  Reference r{std::vector<double>(static_cast<std::size_t>(d)), {-std::numeric_limits<double>::infinity()}, {0}};
  std::vector<double> logits;
  for (const auto& [j, weight] : cells) {
    double dot = 0;
    for (i64 c = 0; c < d; ++c) dot += static_cast<double>(a.q.at(seq, head, i, c)) * a.kv.key(row, j, c);
    logits.push_back(dot * a.layer.softmax_scale + weight);
  }
  if (cells.empty()) return r;
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double x : logits) sum += std::exp(x - top);
  r.lse[0] = top + std::log(sum);
  for (std::size_t n = 0; n < cells.size(); ++n) {
    double norm = 0;
    for (i64 c = 0; c < d; ++c) {
      const double v = a.kv.value(row, cells[n].first, c);
      r.out[static_cast<std::size_t>(c)] += std::exp(logits[n] - r.lse[0]) * v;
      norm += v * v;
    }
    r.pv_norm[0] += std::exp(logits[n] - r.lse[0]) * std::sqrt(norm);
  }
  return r;
}

/// Largest excess over the bound, as a factor of it: <= 1 is within. Infinity where an empty row is not (0, -inf), or
/// for NaN.
inline double worst_excess(const float* out, const float* lse, const Reference& r, i64 head_dim) {
  constexpr double kLse = 4e-6, kOut = 2e-5, kBroken = std::numeric_limits<double>::infinity();
  double worst = 0;
  for (std::size_t n = 0; n < r.lse.size(); ++n) {
    double squares = 0;
    for (i64 c = 0; c < head_dim; ++c) {
      const double e = out[static_cast<i64>(n) * head_dim + c] -
                       r.out[n * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(c)];
      squares += e * e;
    }
    if (std::isinf(r.lse[n])) {
      if (lse[n] != r.lse[n] || squares != 0) return kBroken;
      continue;
    }
    const double e_lse = std::abs(lse[n] - r.lse[n]) / (kLse * std::max(1., std::abs(r.lse[n])));
    const double e_out = std::sqrt(squares) / (kOut * r.pv_norm[n]);
    if (!(e_lse <= kBroken) || !(e_out <= kBroken)) return kBroken;
    worst = std::max({worst, e_lse, e_out});
  }
  return worst;
}

inline double worst_excess(const Result& x, const Reference& r, i64 head_dim) {
  return worst_excess(x.out.data(), x.lse.data(), r, head_dim);
}

/// Result of one query against the reference of that query.
inline double worst_excess_of_query(const Attention& a, const Result& x, i64 seq, i64 head, i64 i) {
  const i64 at = (seq * a.q.heads + head) * a.q.count + i;
  return worst_excess(x.out.data() + at * a.q.head_dim, x.lse.data() + at, brute_force(a, seq, head, i), a.q.head_dim);
}

/// The CPU, as cases.hpp and trace_cases.hpp take a device.
struct CpuSide {
  static constexpr bool kCountsWork = true;
  static constexpr double kLse = 1e-5;
  static constexpr i64 kShippedQueries = 130, kFurtherQueries = 130;
  static Result run(const Attention& a) { return test::run(a); }
  static double excess(const Result& r, const Reference& exact, i64 d) { return worst_excess(r, exact, d); }
};

}  // namespace lacuna::test
