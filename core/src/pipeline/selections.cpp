#include "pipeline/selections.hpp"

#include <algorithm>
#include <limits>

#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/base/error.hpp"
#include "pipeline/row_kernels.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr i64 kGuardWords = 64;
constexpr int kGuardByte = 0x5a;
constexpr i32 kGuard = 0x5a5a5a5a;

/// n words and the guard.
i32* guarded(Scratch& scratch, i64 n) {
  i32* out = scratch.take<i32>(n + kGuardWords);
  scratch.device().fill(out + n, kGuardByte, kGuardWords * sizeof(i32));
  return out;
}
}  // namespace

Selection make_selection(Scratch& scratch, const Rows& rows, i32 kv_block, i64 piece_capacity, i64 token_capacity,
                         bool weighted) {
  const i64 n = rows.count();
  Selection s{};
  s.rows = rows;
  s.kv_block = kv_block;
  s.piece_capacity = static_cast<i32>(piece_capacity);
  s.token_capacity = static_cast<i32>(token_capacity);
  i32* facts = scratch.take_zero<i32>(5 * n);
  s.piece_count = facts;
  s.token_count = facts + n;
  s.exact_sinks = facts + 2 * n;
  s.exact_window = facts + 3 * n;
  s.full = facts + 4 * n;
  s.pieces = guarded(scratch, n * piece_capacity);
  s.tokens = guarded(scratch, n * token_capacity);
  if (weighted) {
    s.piece_log_weight = scratch.take_zero<float>(n * piece_capacity);
    s.token_log_weight = scratch.take_zero<float>(n * token_capacity);
  }
  return s;
}

void check_guards(Scratch& scratch, const Selection& s, const Culprit& who) {
  const auto intact = [&](const i32* list, i64 capacity) {
    const std::vector<i32> words = scratch.read(list + s.rows.count() * capacity, kGuardWords);
    return std::all_of(words.begin(), words.end(), [](i32 w) { return w == kGuard; });
  };
  if (intact(s.pieces, s.piece_capacity) && intact(s.tokens, s.token_capacity)) return;
  throw lacuna::Error(
      Problem{"strategy '" + who.strategy + "' wrote beyond its lists",
              std::to_string(s.piece_capacity) + " pieces and " + std::to_string(s.token_capacity) + " tokens a row",
              "more", "role " + who.role + ", layer " + std::to_string(who.layer),
              "plan max_pieces and max_tokens as large as the lists get"});
}

Budget make_budget(Scratch& scratch, const Rows& rows) {
  const i64 n = rows.count();
  i64* longs = scratch.take<i64>(2 * n);
  i32* ints = scratch.take_zero<i32>(3 * n);
  Budget b{};
  b.rows = rows;
  b.tokens = longs;
  b.pairs = longs + n;
  b.rule = ints;
  b.window_sinks = ints + n;
  b.window_recent = ints + 2 * n;
  return b;
}

void check_host_budget(Scratch& scratch, const Culprit& who, const Budget& budget, i64 total) {
  const i64 n = budget.rows.count();
  std::vector<i64> longs = scratch.read(budget.tokens, 2 * n);
  std::vector<i32> ints = scratch.read(budget.rule, 3 * n);
  Budget host = budget;
  host.tokens = longs.data();
  host.pairs = longs.data() + n;
  host.rule = ints.data();
  host.window_sinks = ints.data() + n;
  host.window_recent = ints.data() + 2 * n;
  check_budget(who, host, total);
}

HostSelection::HostSelection(Scratch& scratch, const Selection& selection) : view_(selection) {
  if (!scratch.on_device()) return;
  const i64 n = selection.rows.count(), p = n * selection.piece_capacity, t = n * selection.token_capacity;
  ints_.resize(static_cast<std::size_t>(5 * n + p + t));
  const auto fetch = [&](auto* to, const auto* from, i64 count) {
    if (count > 0) scratch.device().copy_out(to, from, static_cast<std::size_t>(count) * sizeof *to);
  };
  i32* at = ints_.data();
  fetch(at, selection.piece_count, 5 * n);  // the facts lie together
  fetch(at + 5 * n, selection.pieces, p);
  fetch(at + 5 * n + p, selection.tokens, t);
  view_.piece_count = at;
  view_.token_count = at + n;
  view_.exact_sinks = at + 2 * n;
  view_.exact_window = at + 3 * n;
  view_.full = at + 4 * n;
  view_.pieces = at + 5 * n;
  view_.tokens = at + 5 * n + p;
  if (!selection.token_log_weight) return;
  weights_.resize(static_cast<std::size_t>(p + t));
  fetch(weights_.data(), selection.piece_log_weight, p);
  fetch(weights_.data() + p, selection.token_log_weight, t);
  view_.piece_log_weight = weights_.data();
  view_.token_log_weight = weights_.data() + p;
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
  for (const bool tokens : {false, true}) {
    fill_floats(device, member, -std::numeric_limits<float>::infinity(), n * slots);
    mark_members(device, of_heads, out, tokens, member, slots);
    const i32 capacity = tokens ? out.token_capacity : out.piece_capacity;
    if (capacity == 0) continue;
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
#pragma omp parallel for schedule(dynamic, 4)
  for (i64 r = 0; r < rows.count(); ++r) {
    const i64 source = r / rows.tiles / group * rows.tiles + r % rows.tiles;
    const RowSlots at = row_slots(a.kv.length, rows, r, a.layer.num_kv_heads);
    const RowSet set = expand_row(base, source, at.end);
    const std::vector<i32> cells = set.cells(at.begin, at.end);
    std::copy(cells.begin(), cells.end(), to.tokens + r * to.token_capacity);
    to.token_count[r] = static_cast<i32>(cells.size());
    if (!to.token_log_weight) continue;
    for (std::size_t i = 0; i < cells.size(); ++i)  // cells beside the list weigh 0
      to.token_log_weight[r * to.token_capacity + static_cast<i64>(i)] = set.weight(cells[i]);
  }
}

}  // namespace lacuna
