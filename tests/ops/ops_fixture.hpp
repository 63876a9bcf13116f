// A call to make operations in, and brute-force softmax by original position.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "attention/paged_fixture.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "lacuna/ops/row_set.hpp"

namespace lacuna::test {

struct OpsFixture {
  OpsFixture(const sdk::Layer& layer, const sdk::Paged& kv) : ops(call, cost) {
    call.layer = layer;
    call.kv = kv;
    call.num_seqs = kv.rows / layer.num_kv_heads;
  }
  OpsFixture(const OpsFixture&) = delete;

  sdk::Call call{};
  Cost cost;
  CpuOps ops;
  sdk::Error error{};
};

/// Scaled logits of a query over the slots that it sees.
inline std::vector<double> visible_logits(const sdk::Call& call, const sdk::Queries& q, i64 seq, i64 head, i64 i) {
  const i64 row = seq * call.layer.num_kv_heads + head / call.layer.group();
  std::vector<double> out;
  for (i64 s = 0; s < call.kv.length[row] && call.kv.position_of(row, s) <= q.first_position + i; ++s) {
    double dot = 0;
    for (i64 c = 0; c < q.head_dim; ++c) dot += static_cast<double>(q.at(seq, head, i, c)) * call.kv.key(row, s, c);
    out.push_back(dot * call.layer.softmax_scale);
  }
  return out;
}

inline double lse_of(const std::vector<double>& logits) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double x : logits) top = std::max(top, x);
  for (const double x : logits) sum += std::exp(x - top);
  return top + std::log(sum);
}

inline std::vector<double> softmax_of(std::vector<double> logits) {
  const double lse = lse_of(logits);
  for (double& x : logits) x = std::exp(x - lse);
  return logits;
}

/// Within 1e-5 of the value, or of 1e-5 where it is small.
inline bool near(double found, double expected) {
  return std::abs(found - expected) <= 1e-5 * std::max(1e-2, std::abs(expected));
}

/// Ascending positions with gaps, up to `end`.
inline std::vector<i32> some_positions(i64 n, i64 end, unsigned seed) {
  const std::vector<i32> all = consecutive(end);
  std::vector<i32> out;
  std::sample(all.begin(), all.end(), std::back_inserter(out), n, std::mt19937(seed));
  return out;
}

}  // namespace lacuna::test
