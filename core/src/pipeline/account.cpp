#include "pipeline/account.hpp"

#include <algorithm>

#include "lacuna/base/each.hpp"
#include "pipeline/row_math.hpp"

namespace lacuna {
using namespace sdk;

namespace {

constexpr i64 kWorthThreads = 64;  // rows; a decode step has fewer, and waking threads would take longer than they

/// Pairs of the listed columns that causality cuts off: ranking counts a unit on the diagonal as if every query saw it.
i64 causal_loss(const RowSet& set, RowSlots at) {
  i64 lost = 0;
  for (auto j = set.slots.rbegin(); j != set.slots.rend() && *j > at.begin; ++j) lost += *j - at.begin;
  return lost;
}

}  // namespace

void BudgetAccount::add(const BudgetAccount& o) {
  target_pairs += o.target_pairs;
  realised_pairs += o.realised_pairs;
  union_pairs += o.union_pairs;
  visible_pairs += o.visible_pairs;
  union_visible += o.union_visible;
  slack_pairs += o.slack_pairs;
  causal_loss += o.causal_loss;
  floor |= o.floor;
}

void account_range(Choice& choice, const Selection& selection, const Layer& layer, const std::vector<i32>& length) {
  const Rows& rows = selection.rows;
  const i32 group = layer.group(), all_tiles = choice.tiles();
  choice.sets.resize(static_cast<std::size_t>(layer.num_qo_heads) * static_cast<std::size_t>(all_tiles));
  const i64 kv_rows = static_cast<i64>(layer.num_kv_heads) * rows.tiles;
  std::vector<BudgetAccount> accounts(static_cast<std::size_t>(kv_rows));
  std::vector<double> touched(static_cast<std::size_t>(kv_rows));
  each(kv_rows, kWorthThreads, [&](i64 kr) {
    const i64 kv_head = kr / rows.tiles, tile = kr % rows.tiles;
    std::vector<const RowSet*> members;
    BudgetAccount& a = accounts[static_cast<std::size_t>(kr)];
    RowSlots at{};
    for (i32 g = 0; g < group; ++g) {
      const i64 head = kv_head * group + g, row = (rows.per_query_head ? head : kv_head) * rows.tiles + tile;
      at = row_slots(length.data(), rows, row, layer.num_kv_heads);
      RowSet& set = choice.sets[static_cast<std::size_t>(head * all_tiles + rows.tile_begin + tile)];
      set = expand_row(selection, row, at.end);
      members.push_back(&set);
      a.realised_pairs += static_cast<double>(set.pairs(at.begin, at.end));
      a.causal_loss += static_cast<double>(causal_loss(set, at));
      a.visible_pairs += static_cast<double>(capped_pairs(at.end, at.begin, at.end));
    }
    const RowSet all = rows.per_query_head ? unite(members) : *members[0];
    a.union_pairs = static_cast<double>(all.pairs(at.begin, at.end));
    a.union_visible = static_cast<double>(capped_pairs(at.end, at.begin, at.end));
    touched[static_cast<std::size_t>(kr)] = static_cast<double>(all.touched(at.begin, at.end));
  });
  for (i64 kr = 0; kr < kv_rows; ++kr) {
    choice.budget.add(accounts[static_cast<std::size_t>(kr)]);
    choice.touched_tokens += touched[static_cast<std::size_t>(kr)];
  }
}

void account_targets(Choice& choice, const Layer& layer, const Budget& budget, i32 unit_tokens) {
  const Rows& rows = budget.rows;
  const double readers = rows.per_query_head ? 1.0 : layer.group();  // query heads of a row
  for (i64 r = 0; r < rows.count(); ++r) {
    if (static_cast<Rule>(budget.rule[r]) != Rule::ranked) continue;
    choice.budget.target_pairs += readers * static_cast<double>(budget.pairs[r]);
    choice.budget.slack_pairs +=
        readers * static_cast<double>(unit_tokens) * static_cast<double>(rows.query_end(r) - rows.query_begin(r));
  }
}

void keep_lists(Choice& choice, const Selection& s) {
  choice.lists.resize(static_cast<std::size_t>(choice.rows.count()));
  for (i64 r = 0; r < s.rows.count(); ++r) {
    RowLists& l =
        choice
            .lists[static_cast<std::size_t>(s.rows.head_of(r) * static_cast<i64>(choice.tiles()) + s.rows.tile_of(r))];
    const i32 *p = s.pieces + r * s.piece_capacity, *t = s.tokens + r * s.token_capacity;
    l.pieces.assign(p, p + s.piece_count[r]);
    l.tokens.assign(t, t + s.token_count[r]);
    l.sinks = s.exact_sinks[r];
    l.window = s.exact_window[r];
    l.full = s.full[r];
  }
}

}  // namespace lacuna
