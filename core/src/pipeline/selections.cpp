#include "pipeline/selections.hpp"

#include <algorithm>
#include <limits>

#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/base/each.hpp"
#include "lacuna/base/error.hpp"
#include "pipeline/row_kernels.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr i64 kWorthThreads = 64;  // rows
constexpr i64 kGuardWords = 64;
constexpr int kGuardByte = 0x5a;
constexpr i32 kGuard = 0x5a5a5a5a;

/// Places its arrays in one block: [rows] facts five times, pieces, guard, tokens, guard.
void place(Selection& s, i32* block) {
  const i64 n = s.rows.count();
  s.piece_count = block;
  s.token_count = block + n;
  s.exact_sinks = block + 2 * n;
  s.exact_window = block + 3 * n;
  s.full = block + 4 * n;
  s.pieces = block + 5 * n;
  s.tokens = s.pieces + n * s.piece_capacity + kGuardWords;
}
i64 block_words(const Selection& s) {
  return s.rows.count() * (5 + static_cast<i64>(s.piece_capacity) + s.token_capacity) + 2 * kGuardWords;
}
i32* piece_guard(const Selection& s) { return s.pieces + s.rows.count() * s.piece_capacity; }
i32* token_guard(const Selection& s) { return s.tokens + s.rows.count() * s.token_capacity; }

/// tokens, pairs, then rule, window_sinks, window_recent, in one block of 64-bit words.
void place(Budget& b, i64* block) {
  const i64 n = b.rows.count();
  b.tokens = block;
  b.pairs = block + n;
  auto* ints = reinterpret_cast<i32*>(block + 2 * n);
  b.rule = ints;
  b.window_sinks = ints + n;
  b.window_recent = ints + 2 * n;
}
i64 block_words(const Budget& b) { return 2 * b.rows.count() + (3 * b.rows.count() + 1) / 2; }
}  // namespace

Selection make_selection(Scratch& scratch, const Rows& rows, i32 kv_block, i64 piece_capacity, i64 token_capacity,
                         bool weighted) {
  const i64 n = rows.count();
  Selection s{};
  s.rows = rows;
  s.kv_block = kv_block;
  s.piece_capacity = static_cast<i32>(piece_capacity);
  s.token_capacity = static_cast<i32>(token_capacity);
  place(s, scratch.take<i32>(block_words(s)));
  scratch.device().fill(s.piece_count, 0, static_cast<std::size_t>(5 * n) * sizeof(i32));
  for (i32* guard : {piece_guard(s), token_guard(s)})
    scratch.device().fill(guard, kGuardByte, kGuardWords * sizeof(i32));
  if (weighted) {
    s.piece_log_weight = scratch.take_zero<float>(n * (piece_capacity + token_capacity));
    s.token_log_weight = s.piece_log_weight + n * piece_capacity;
  }
  return s;
}

void give_extras(Scratch& scratch, Selection& s, i64 capacity, i32 head_dim) {
  const i64 n = s.rows.count();
  s.extra_capacity = static_cast<i32>(capacity);
  s.extra_count = scratch.take_zero<i32>(n);
  s.extra_k = scratch.take_zero<float>(n * capacity * head_dim);
  s.extra_v = scratch.take_zero<float>(n * capacity * head_dim);
  s.extra_log_weight = scratch.take_zero<float>(n * capacity);
}

Budget make_budget(Scratch& scratch, const Rows& rows) {
  Budget b{};
  b.rows = rows;
  b.mean_tokens = -1;
  place(b, scratch.take<i64>(block_words(b)));
  scratch.device().fill(b.rule, 0, static_cast<std::size_t>(3 * rows.count()) * sizeof(i32));
  return b;
}

HostBudget::HostBudget(Scratch& scratch, const Budget& budget) : view_(budget) {
  if (!scratch.on_device()) return;
  copy_ = scratch.read(budget.tokens, block_words(budget));
  place(view_, copy_.data());
}

HostSelection::HostSelection(Scratch& scratch, const Selection& selection)
    : view_(selection), piece_room_(selection.piece_capacity), token_room_(selection.token_capacity) {
  constexpr i64 kWholeCopy = i64{1} << 18;  // words up to which one copy is best, whatever it holds
  if (!scratch.on_device()) return;
  Device& device = scratch.device();
  const i64 n = selection.rows.count();
  const bool whole = block_words(selection) <= kWholeCopy;
  if (!whole) {  // capacities are of the worst case: copy what the lists hold
    const std::vector<i32> counts = scratch.read(selection.piece_count, 2 * n);  // the tokens' follow
    const auto longest = [&](const i32* of, i32 capacity) {
      return std::clamp(n > 0 ? *std::max_element(of, of + n) : 0, 0, capacity);
    };
    view_.piece_capacity = longest(counts.data(), selection.piece_capacity);
    view_.token_capacity = longest(counts.data() + n, selection.token_capacity);
  }
  const i64 words = block_words(view_);
  ints_ = std::make_unique_for_overwrite<i32[]>(static_cast<std::size_t>(words));
  place(view_, ints_.get());
  const auto fetch = [&](auto* to, const auto* from, i64 count) {
    device.copy_out(to, from, static_cast<std::size_t>(count) * sizeof *to);
  };
  const auto fetch_rows = [&](auto* to, const auto* from, i64 columns, i64 capacity) {
    device.copy_out_rows(to, from, static_cast<std::size_t>(n), static_cast<std::size_t>(columns) * sizeof *to,
                         static_cast<std::size_t>(capacity) * sizeof *to);
  };
  if (whole) {
    fetch(ints_.get(), selection.piece_count, words);
  } else {
    fetch(ints_.get(), selection.piece_count, 5 * n);
    fetch_rows(view_.pieces, selection.pieces, view_.piece_capacity, selection.piece_capacity);
    fetch_rows(view_.tokens, selection.tokens, view_.token_capacity, selection.token_capacity);
    fetch(piece_guard(view_), piece_guard(selection), kGuardWords);
    fetch(token_guard(view_), token_guard(selection), kGuardWords);
  }
  if (!selection.token_log_weight) return;
  const i64 pieces = n * view_.piece_capacity, tokens = n * view_.token_capacity;
  weights_ = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(pieces + tokens));
  view_.piece_log_weight = weights_.get();
  view_.token_log_weight = weights_.get() + pieces;
  fetch_rows(view_.piece_log_weight, selection.piece_log_weight, view_.piece_capacity, selection.piece_capacity);
  fetch_rows(view_.token_log_weight, selection.token_log_weight, view_.token_capacity, selection.token_capacity);
}

void HostSelection::check_guards(const Culprit& who) const {
  const auto intact = [](const i32* words) {
    return std::all_of(words, words + kGuardWords, [](i32 w) { return w == kGuard; });
  };
  if (intact(piece_guard(view_)) && intact(token_guard(view_))) return;
  throw lacuna::Error(
      Problem{"strategy '" + who.strategy + "' wrote beyond its lists",
              std::to_string(piece_room_) + " pieces and " + std::to_string(token_room_) + " tokens a row", "more",
              "role " + who.role + ", layer " + std::to_string(who.layer),
              "plan max_pieces and max_tokens as large as the lists get"});
}

Scores ask_scores(StrategyRuntime& strategy, KvCache& cache, const CallSpan& span, Scratch& scratch, Scores scores,
                  const Rows& ranked, bool check, double row_mass) {
  const i64 elements = scores.rows.count() * scores.stride;
  scores.value = scratch.take<float>(elements);
  fill_floats(scratch.device(), scores.value, -std::numeric_limits<float>::infinity(), elements);
  strategy.score(cache, span, scores);
  if (check) {
    std::vector<float> host = scratch.read(scores.value, elements);
    Scores view = scores;
    view.value = host.data();
    check_scores(strategy.culprit("score"), view, strategy.plan().score_kind, row_mass);
  }
  if (scores.rows.per_query_head == ranked.per_query_head) return scores;
  const Gqa g = strategy.gqa();
  const Reduce how = g == Gqa::max ? Reduce::max : g == Gqa::mean ? Reduce::mean : Reduce::sum;
  const i64 of_head = static_cast<i64>(ranked.tiles) * scores.stride;
  float* grouped = scratch.take<float>(ranked.count() * scores.stride);
  strategy.with_ops(cache, span, [&](CoreOps& ops) {
    sdk::Error error{};
    if (ops.group_reduce(scores.value, grouped, of_head, of_head, how, &error) != 0)
      throw lacuna::Error(Problem{
          std::string("scores of strategy '") + strategy.entry().name + "' could not be reduced over their groups", "",
          error.text, "group_reduce", ""});
  });
  scores.value = grouped;
  scores.rows = ranked;
  return scores;
}

Selection unite_groups(Scratch& scratch, CoreOps& ops, const Paged& kv, const Selection& of_heads, i32 num_kv_heads) {
  Rows rows = of_heads.rows;
  const i32 group = rows.heads / num_kv_heads;
  rows.heads = num_kv_heads;
  rows.per_query_head = 0;
  const i64 n = rows.count(), slots = kv.max_length;
  const auto room = [&](i64 capacity) { return std::min<i64>(capacity * group, capacity > 0 ? slots : 0); };
  Selection out = make_selection(scratch, rows, of_heads.kv_block, room(of_heads.piece_capacity),
                                 room(of_heads.token_capacity), false);
  const Device& device = scratch.device();
  const Scratch::Frame frame(scratch);
  float* member = scratch.take<float>(n * slots);
  i32 *range = scratch.take<i32>(n), *wanted = scratch.take<i32>(n);
  fill_rows(device, range, static_cast<i32>(slots), n);
  fill_rows(device, wanted, static_cast<i32>(slots), n);
  unite_facts(device, of_heads, out);
  for (const bool tokens : {false, true}) {
    const i32 capacity = tokens ? out.token_capacity : out.piece_capacity;
    if (capacity == 0) continue;
    fill_floats(device, member, -std::numeric_limits<float>::infinity(), n * slots);
    mark_members(device, of_heads, out, tokens, member, slots);
    sdk::Error error{};
    if (ops.topk(member, static_cast<i32>(n), slots, range, wanted, tokens ? out.tokens : out.pieces,
                 tokens ? out.token_count : out.piece_count, capacity, &error) != 0)
      throw lacuna::Error(Problem{"the union of a group's choices failed", "", error.text, "topk", ""});
  }
  return out;
}

void list_cells(Scratch& scratch, const Attention& a, const Selection& base, const Selection& to) {
  if (scratch.on_device()) {
    const Scratch::Frame frame(scratch);
    const i64 n = base.rows.count(), stride = a.kv.max_length;
    i32 *slot = scratch.take<i32>(n * stride), *count = scratch.take<i32>(n);
    float* weight = to.token_log_weight ? scratch.take<float>(n * stride) : nullptr;
    void* owners = weight ? scratch.take<i64>(n * stride) : nullptr;
    Attention read = a;
    read.read = &base;
    list_keys_cuda(read, slot, weight, count, stride, owners, scratch.device().stream());
    spread_lists(scratch.device(), a.kv.length, base.rows, slot, weight, count, stride, a.layer.num_kv_heads, to);
    return;
  }
  const Rows& rows = to.rows;
  const i32 group = rows.heads / base.rows.heads;
  each(rows.count(), kWorthThreads, [&](i64 r) {
    const i64 source = r / rows.tiles / group * rows.tiles + r % rows.tiles;
    const RowSlots at = row_slots(a.kv.length, rows, r, a.layer.num_kv_heads);
    const RowSet set = expand_row(base, source, at.end);
    const std::vector<i32> cells = set.cells(at.begin, at.end);
    std::copy(cells.begin(), cells.end(), to.tokens + r * to.token_capacity);
    to.token_count[r] = static_cast<i32>(cells.size());
    if (!to.token_log_weight) return;
    for (std::size_t i = 0; i < cells.size(); ++i)  // cells beside the list weigh 0
      to.token_log_weight[r * to.token_capacity + static_cast<i64>(i)] = set.weight(cells[i]);
  });
}

}  // namespace lacuna
