#include "lacuna/ops/row_set.hpp"

#include <algorithm>
#include <numeric>

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

// Order of a list by its slots, ties by place: the first of two equal slots decides the weight.
std::vector<i32> ascending(const i32* slots, i32 n) {
  std::vector<i32> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (!std::is_sorted(slots, slots + n))
    std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) { return slots[a] < slots[b]; });
  return order;
}

// Members of `slots` in [lo, hi).
i64 members(const std::vector<i32>& slots, i64 lo, i64 hi) {
  if (hi <= lo) return 0;
  return std::lower_bound(slots.begin(), slots.end(), hi) - std::lower_bound(slots.begin(), slots.end(), lo);
}

// Slots of [0, sinks) and [window_begin, end) that are not in `slots`.
i64 exact_outside(const std::vector<i32>& slots, i64 sinks, i64 window_begin, i64 end) {
  sinks = std::min(sinks, end);
  window_begin = std::min(std::max(window_begin, sinks), end);
  return sinks - members(slots, 0, sinks) + (end - window_begin) - members(slots, window_begin, end);
}

}  // namespace

float RowSet::weight(i32 slot) const {
  if (log_weight.empty()) return 0.f;
  const auto found = std::lower_bound(slots.begin(), slots.end(), slot);
  return found != slots.end() && *found == slot ? log_weight[static_cast<std::size_t>(found - slots.begin())] : 0.f;
}

i64 RowSet::pairs(i64 begin, i64 end) const {
  i64 sum = 0;
  for (i64 s = begin; s < end; ++s)
    sum += members(slots, 0, s + 1) + exact_outside(slots, exact_sinks, s - exact_window + 1, s + 1);
  return sum;
}

i64 RowSet::touched(i64 begin, i64 end) const {
  if (end <= begin) return 0;
  const i64 window_begin = exact_window > 0 ? begin - exact_window + 1 : end;
  return members(slots, 0, end) + exact_outside(slots, exact_sinks, window_begin, end);
}

std::vector<i32> RowSet::cells(i64 begin, i64 end) const {
  std::vector<i32> out;
  if (end <= begin) return out;
  const i64 sinks = std::min<i64>(exact_sinks, end);
  const i64 window_begin = exact_window > 0 ? std::max(begin - exact_window + 1, sinks) : end;
  std::vector<i32> exact(static_cast<std::size_t>(sinks + std::max<i64>(0, end - window_begin)));
  std::iota(exact.begin(), exact.begin() + sinks, 0);
  std::iota(exact.begin() + sinks, exact.end(), static_cast<i32>(window_begin));
  const auto last = std::lower_bound(slots.begin(), slots.end(), end);
  out.reserve(exact.size() + static_cast<std::size_t>(last - slots.begin()));
  std::set_union(slots.begin(), last, exact.begin(), exact.end(), std::back_inserter(out));
  return out;
}

RowSet expand_row(const sdk::Selection& selection, i64 row, i64 visible) {
  RowSet out;
  if (selection.full && selection.full[row]) {
    out.slots.resize(static_cast<std::size_t>(visible));
    std::iota(out.slots.begin(), out.slots.end(), 0);
    return out;
  }
  if (selection.exact_sinks) out.exact_sinks = selection.exact_sinks[row];
  if (selection.exact_window) out.exact_window = selection.exact_window[row];
  const bool weighted = selection.piece_log_weight || selection.token_log_weight;
  const i32 num_pieces = selection.piece_count ? selection.piece_count[row] : 0;
  const i32 num_tokens = selection.token_count ? selection.token_count[row] : 0;
  const i64 first_piece = row * selection.piece_capacity, first_token = row * selection.token_capacity;
  const i32* pieces = selection.pieces + first_piece;
  const i32* tokens = selection.tokens + first_token;

  std::vector<i32> covered;
  std::vector<float> covered_weight;
  i64 next = 0;
  if (num_pieces > 0)
    for (const i32 p : ascending(pieces, num_pieces)) {
      const i64 end = std::min<i64>(visible, static_cast<i64>(pieces[p]) + selection.kv_block);
      for (i64 s = std::max<i64>(pieces[p], next); s < end; ++s) {
        covered.push_back(static_cast<i32>(s));
        if (weighted)
          covered_weight.push_back(selection.piece_log_weight ? selection.piece_log_weight[first_piece + p] : 0.f);
      }
      next = std::max(next, end);
    }
  if (num_tokens == 0) {
    out.slots = std::move(covered);
    out.log_weight = std::move(covered_weight);
    return out;
  }

  const auto take = [&](i32 slot, float weight) {
    out.slots.push_back(slot);
    if (weighted) out.log_weight.push_back(weight);
  };
  out.slots.reserve(covered.size() + static_cast<std::size_t>(num_tokens));
  std::size_t c = 0;
  for (const i32 t : ascending(tokens, num_tokens)) {
    const i32 slot = tokens[t];
    if (slot < 0 || slot >= visible) continue;
    for (; c < covered.size() && covered[c] <= slot; ++c) take(covered[c], weighted ? covered_weight[c] : 0.f);
    if (!out.slots.empty() && out.slots.back() == slot) continue;
    take(slot, selection.token_log_weight ? selection.token_log_weight[first_token + t] : 0.f);
  }
  for (; c < covered.size(); ++c) take(covered[c], weighted ? covered_weight[c] : 0.f);
  return out;
}

RowSet unite(const std::vector<const RowSet*>& sets) {
  RowSet out;
  std::vector<i32> merged;
  for (const RowSet* set : sets) {
    merged.clear();
    std::set_union(out.slots.begin(), out.slots.end(), set->slots.begin(), set->slots.end(),
                   std::back_inserter(merged));
    out.slots.swap(merged);
    out.exact_sinks = std::max(out.exact_sinks, set->exact_sinks);
    out.exact_window = std::max(out.exact_window, set->exact_window);
  }
  return out;
}

}  // namespace lacuna
