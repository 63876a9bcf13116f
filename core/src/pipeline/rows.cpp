#include "pipeline/rows.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "lacuna/pipeline/budget.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr float kNone = -std::numeric_limits<float>::infinity();

/// Indices of the k best (all when k is larger), best first, ties to the lower index, -inf left out.
std::vector<i32> best_first(const std::vector<float>& value, i64 k) {
  std::vector<i32> order;
  for (std::size_t i = 0; i < value.size(); ++i)
    if (value[i] > kNone) order.push_back(static_cast<i32>(i));
  const auto better = [&](i32 a, i32 b) {
    const float x = value[static_cast<std::size_t>(a)], y = value[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  };
  const auto n = static_cast<std::size_t>(std::clamp<i64>(k, 0, static_cast<i64>(order.size())));
  if (n < order.size())
    std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n), order.end(), better);
  order.resize(n);
  std::sort(order.begin(), order.end(), better);
  return order;
}
}  // namespace

RowSlots row_slots(const Paged& kv, const Rows& rows, i64 row, i32 num_kv_heads) {
  const i64 first = kv.length[rows.kv_row(row, num_kv_heads)] - rows.num_queries;
  return {first + rows.query_begin(row), first + rows.query_end(row)};
}

OwnedBudget::OwnedBudget(const Rows& rows) {
  const auto n = static_cast<std::size_t>(rows.count());
  longs_.assign(2 * n, 0);
  ints_.assign(3 * n, 0);
  view_.rows = rows;
  view_.tokens = longs_.data();
  view_.pairs = longs_.data() + n;
  view_.rule = ints_.data();  // Rule::ranked is 0
  view_.window_sinks = ints_.data() + n;
  view_.window_recent = ints_.data() + 2 * n;
}

std::vector<i32> top_units(const std::vector<float>& value, i64 k) {
  std::vector<i32> out = best_first(value, k);
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<i32> top_mass_units(const std::vector<float>& candidate, const std::vector<float>& value,
                                const std::vector<i32>& forced, double p) {
  double total = 0, mass = 0;
  for (const float v : value)
    if (std::isfinite(v)) total += v;
  for (const i32 u : forced)
    if (std::isfinite(value[static_cast<std::size_t>(u)])) mass += value[static_cast<std::size_t>(u)];
  std::vector<i32> out;
  for (const i32 u : best_first(candidate, static_cast<i64>(candidate.size()))) {
    if (!(mass < p * total)) break;
    mass += value[static_cast<std::size_t>(u)];
    out.push_back(u);
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<float> reduce_rows(const std::vector<float>& value, const Layer& layer, i32 tiles, i64 units, Gqa how) {
  const i32 group = layer.group();
  const i64 row_size = static_cast<i64>(tiles) * units;
  std::vector<float> out(static_cast<std::size_t>(layer.num_kv_heads * row_size));
#pragma omp parallel for schedule(static)
  for (i64 i = 0; i < layer.num_kv_heads * row_size; ++i) {
    const float* in = value.data() + (i / row_size) * group * row_size + i % row_size;
    float acc = in[0];
    for (i32 g = 1; g < group; ++g) {
      const float x = in[g * row_size];
      acc = how == Gqa::max ? std::max(acc, x) : acc + x;
    }
    out[static_cast<std::size_t>(i)] = how == Gqa::mean ? acc / static_cast<float>(group) : acc;
  }
  return out;
}

void account_target(BudgetAccount& account, const Layer& layer, const Rows& rows, RowSlots at, i64 pairs,
                    i32 unit_tokens) {
  const double readers = rows.per_query_head ? 1.0 : layer.group();
  account.target_pairs += readers * static_cast<double>(pairs);
  account.slack_pairs += readers * static_cast<double>(unit_tokens) * static_cast<double>(at.end - at.begin);
}

void rank_normalise(float* value, i64 rows, i64 stride, const std::vector<i64>& count) {
  for (i64 r = 0; r < rows; ++r) {
    const i64 n = count[static_cast<std::size_t>(r)];
    const std::vector<float> row(value + r * stride, value + r * stride + n);
    const std::vector<i32> order = best_first(row, n);
    for (std::size_t i = 0; i < order.size(); ++i) {
      float& v = value[r * stride + order[i]];
      if (std::isfinite(v)) v = 1.f - static_cast<float>(i) / static_cast<float>(n);
    }
  }
}

}  // namespace lacuna
