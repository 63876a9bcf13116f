#include "lacuna/strategy/contract.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lacuna/base/each.hpp"
#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

/// One row under examination.
struct Row {
  const Culprit& who;
  const sdk::Rows& rows;
  i64 index;

  [[noreturn]] void refuse(const std::string& what, const std::string& expected, const std::string& found) const {
    std::string where = fmt::format("layer {}, {} {}, tile {}", who.layer, rows.per_query_head ? "head" : "KV head",
                                    rows.head_of(index), rows.tile_of(index));
    if (rows.seqs > 1) where += fmt::format(", sequence {}", rows.seq_of(index));
    throw Error({fmt::format("strategy '{}', role {}: {}", who.strategy, who.role, what), expected, found, where, ""});
  }
  void count_within(const char* what, i32 count, i32 capacity) const {
    if (count < 0 || count > capacity)
      refuse(fmt::format("number of {}", what), fmt::format("0..{}", capacity), fmt::to_string(count));
  }
  /// Unique and in [0, end).
  void indices(const char* what, const i32* list, i32 count, i64 end) const {
    for (i32 i = 0; i < count; ++i) {
      if (list[i] < 0 || list[i] >= end) {
        refuse(fmt::format("{} out of range", what),
               end > 0 ? fmt::format("slots 0..{}", end - 1) : "none, nothing is there", fmt::to_string(list[i]));
      }
    }
    if (std::is_sorted(list, list + count, std::less_equal<>())) return;  // ascending and unique
    std::vector<i32> sorted(list, list + count);
    std::sort(sorted.begin(), sorted.end());
    const auto twin = std::adjacent_find(sorted.begin(), sorted.end());
    if (twin != sorted.end()) refuse(fmt::format("{} listed twice", what), "each index once", fmt::to_string(*twin));
  }
  void log_weights(const char* what, const float* weights, i32 count) const {
    for (i32 i = 0; weights && i < count; ++i) {
      if (!std::isfinite(weights[i]))
        refuse(fmt::format("log weight of a {}", what), "a finite number", fmt::to_string(weights[i]));
    }
  }
};

constexpr i64 kWorthThreads = 64;  // rows

}  // namespace

void check_scores(const Culprit& who, const sdk::Scores& scores, sdk::ScoreKind kind, double row_mass) {
  constexpr double kSlack = 1e-3;
  const sdk::Rows& rows = scores.rows;
  each(rows.count(), kWorthThreads, [&](i64 r) {
    const Row row{who, rows, r};
    i64 units = scores.units;
    // In prefill units after the tile's last query are ignored, whatever stands there: slots never exceed positions.
    if (rows.num_queries > 1)
      units = std::min(units, (rows.first_position + rows.query_end(r) - 1) / scores.unit_tokens + 1);
    const float* value = scores.value + r * scores.stride;
    double sum = 0;
    for (i64 u = 0; u < units; ++u) {
      if (std::isnan(value[u])) row.refuse(fmt::format("score of unit {}", u), "a number or an infinity", "NaN");
      if (kind != sdk::ScoreKind::mass || std::isinf(value[u])) continue;
      if (value[u] < 0)
        row.refuse(fmt::format("score of kind mass of unit {}", u), "at least 0", fmt::to_string(value[u]));
      sum += value[u];
    }
    if (kind == sdk::ScoreKind::mass && sum > (1 + kSlack) * row_mass) {
      row.refuse("sum of a row of scores of kind mass", fmt::format("at most {}", row_mass), fmt::to_string(sum));
    }
  });
}

void check_budget(const Culprit& who, const sdk::Budget& budget, i64 total) {
  i64 sum = 0;
  for (i64 r = 0; r < budget.rows.count(); ++r) {
    const Row row{who, budget.rows, r};
    const i32 rule = budget.rule[r];
    if (rule < static_cast<i32>(sdk::Rule::ranked) || rule > static_cast<i32>(sdk::Rule::none)) {
      row.refuse("rule", "ranked, full, window or none (0..3)", fmt::to_string(rule));
    }
    if (budget.tokens[r] < 0 || budget.pairs[r] < 0) {
      row.refuse("target", "tokens and pairs of at least 0",
                 fmt::format("{} tokens, {} pairs", budget.tokens[r], budget.pairs[r]));
    }
    if (rule == static_cast<i32>(sdk::Rule::window) && (budget.window_sinks[r] < 0 || budget.window_recent[r] < 0)) {
      row.refuse("window", "sinks and recent of at least 0",
                 fmt::format("{} sinks, {} recent", budget.window_sinks[r], budget.window_recent[r]));
    }
    if (rule != static_cast<i32>(sdk::Rule::ranked)) continue;
    if (budget.pairs[r] > total - sum) {
      row.refuse("targets of the ranked rows up to this one", fmt::format("a sum of at most {} pairs", total),
                 fmt::format("{} and {} more", sum, budget.pairs[r]));
    }
    sum += budget.pairs[r];
  }
}

void check_selection(const Culprit& who, const sdk::Selection& s, const i64* visible) {
  each(s.rows.count(), kWorthThreads, [&](i64 r) {
    const Row row{who, s.rows, r};
    const i32 pieces = s.piece_count[r], tokens = s.token_count[r], sinks = s.exact_sinks[r],
              window = s.exact_window[r];
    row.count_within("pieces", pieces, s.piece_capacity);
    row.count_within("tokens", tokens, s.token_capacity);
    if (pieces > 0 && s.kv_block < 1)
      row.refuse("pieces without a block size", "kv_block >= 1", fmt::to_string(s.kv_block));
    if (sinks < 0 || window < 0) {
      row.refuse("exact part", "sinks and window of at least 0", fmt::format("{} sinks, window {}", sinks, window));
    }
    const i64 first_piece = r * s.piece_capacity, first_token = r * s.token_capacity;
    row.indices("piece", s.pieces + first_piece, pieces, visible[r]);
    row.indices("token", s.tokens + first_token, tokens, visible[r]);
    if (s.piece_log_weight) row.log_weights("piece", s.piece_log_weight + first_piece, pieces);
    if (s.token_log_weight) row.log_weights("token", s.token_log_weight + first_token, tokens);
    if (visible[r] > 0 && !s.full[r] && pieces == 0 && tokens == 0 && sinks == 0 && window == 0) {
      row.refuse("nothing to read", "at least one of the visible tokens",
                 fmt::format("an empty row that sees {} tokens", visible[r]));
    }
  });
}

void check_kept(const Culprit& who, const sdk::Kept& kept, const i32* length) {
  const sdk::Selection& s = kept.set;
  for (i64 r = 0; r < s.rows.count(); ++r) {
    const Row row{who, s.rows, r};
    row.count_within("kept tokens", s.token_count[r], s.token_capacity);
    row.indices("kept token", s.tokens + r * s.token_capacity, s.token_count[r], length[r]);
    if (length[r] > 0 && s.token_count[r] == 0)
      row.refuse("nothing is kept", "at least one token", fmt::format("none of {}", length[r]));
  }
}

void check_rewrite(const Culprit& who, const sdk::Rewrite& w, const sdk::u8* bad, const i32* length) {
  const sdk::Rows rows{1, w.rows, 0, 1, 1, 0, 1, 0};
  for (i64 r = 0; r < w.rows; ++r) {
    const Row row{who, rows, r};
    for (i64 i = 0; i < w.kept_count[r]; ++i)
      if (bad[r * w.slots + i])
        row.refuse("key or value of a kept token", "finite numbers", fmt::format("slot {}", w.kept[r * w.slots + i]));
    if (const i32 until = w.channels_dropped_until[r]; until < 0 || until > length[r])
      row.refuse("tokens that lose channels", fmt::format("0..{}", length[r]), fmt::to_string(until));
    for (i64 c = 0; c < w.head_dim; ++c)
      if (const int flag = w.drop_channel[r * w.head_dim + c]; flag > 1)
        row.refuse(fmt::format("mark of channel {}", c), "0 or 1", fmt::to_string(flag));
  }
}

}  // namespace lacuna
