#include "pipeline/row_lists.hpp"

#include <algorithm>

namespace lacuna {
using namespace sdk;

OwnedSelection::OwnedSelection(const Rows& rows, i32 kv_block, i64 piece_capacity, i64 token_capacity, bool weighted) {
  const i64 n = rows.count();
  ints_.assign(static_cast<std::size_t>(n * (5 + piece_capacity + token_capacity)), 0);
  i32* p = ints_.data();
  view_.rows = rows;
  view_.kv_block = kv_block;
  view_.piece_capacity = static_cast<i32>(piece_capacity);
  view_.token_capacity = static_cast<i32>(token_capacity);
  view_.piece_count = p;
  view_.token_count = p + n;
  view_.exact_sinks = p + 2 * n;
  view_.exact_window = p + 3 * n;
  view_.full = p + 4 * n;
  view_.pieces = p + 5 * n;
  view_.tokens = view_.pieces + n * piece_capacity;
  if (weighted) {
    weights_.assign(static_cast<std::size_t>(n * (piece_capacity + token_capacity)), 0.f);
    view_.piece_log_weight = weights_.data();
    view_.token_log_weight = weights_.data() + n * piece_capacity;
  }
}

OwnedSelection pack(const Rows& rows, i32 kv_block, const std::vector<RowLists>& lists, bool weighted) {
  std::size_t pieces = 0, tokens = 0;
  for (const auto& l : lists) pieces = std::max(pieces, l.pieces.size()), tokens = std::max(tokens, l.tokens.size());
  OwnedSelection out(rows, kv_block, static_cast<i64>(pieces), static_cast<i64>(tokens), weighted);
  Selection& s = out.view();
  for (std::size_t r = 0; r < lists.size(); ++r) {
    const auto& l = lists[r];
    s.piece_count[r] = static_cast<i32>(l.pieces.size());
    s.token_count[r] = static_cast<i32>(l.tokens.size());
    std::copy(l.pieces.begin(), l.pieces.end(), s.pieces + static_cast<i64>(r) * s.piece_capacity);
    std::copy(l.tokens.begin(), l.tokens.end(), s.tokens + static_cast<i64>(r) * s.token_capacity);
    std::copy(l.piece_weights.begin(), l.piece_weights.end(),
              s.piece_log_weight + static_cast<i64>(r) * s.piece_capacity);
    std::copy(l.token_weights.begin(), l.token_weights.end(),
              s.token_log_weight + static_cast<i64>(r) * s.token_capacity);
    s.exact_sinks[r] = l.sinks;
    s.exact_window[r] = l.window;
    s.full[r] = l.full;
  }
  return out;
}

RowLists unpack(const Selection& s, i64 row) {
  RowLists l;
  const i32 *p = s.pieces + row * s.piece_capacity, *t = s.tokens + row * s.token_capacity;
  l.pieces.assign(p, p + s.piece_count[row]);
  l.tokens.assign(t, t + s.token_count[row]);
  if (s.piece_log_weight)
    l.piece_weights.assign(s.piece_log_weight + row * s.piece_capacity,
                           s.piece_log_weight + row * s.piece_capacity + s.piece_count[row]);
  if (s.token_log_weight)
    l.token_weights.assign(s.token_log_weight + row * s.token_capacity,
                           s.token_log_weight + row * s.token_capacity + s.token_count[row]);
  l.sinks = s.exact_sinks[row];
  l.window = s.exact_window[row];
  l.full = s.full[row];
  return l;
}

RowLists unite_lists(const std::vector<RowLists>& lists, const Rows& rows, i32 kv_head, i32 group, i32 tile) {
  RowLists out;
  for (i32 g = 0; g < group; ++g) {
    const auto& l = lists[static_cast<std::size_t>((kv_head * group + g) * rows.tiles + tile)];
    out.pieces.insert(out.pieces.end(), l.pieces.begin(), l.pieces.end());
    out.tokens.insert(out.tokens.end(), l.tokens.begin(), l.tokens.end());
    out.sinks = std::max(out.sinks, l.sinks);
    out.window = std::max(out.window, l.window);
    out.full |= l.full;
  }
  for (auto* v : {&out.pieces, &out.tokens}) {
    std::sort(v->begin(), v->end());
    v->erase(std::unique(v->begin(), v->end()), v->end());
  }
  return out;
}

}  // namespace lacuna
