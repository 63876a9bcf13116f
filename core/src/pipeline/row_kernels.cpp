#include "pipeline/row_kernels.hpp"

#include <limits>

#include "lacuna/device/parallel.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr i64 kPartial = 256;  // values that one thread sums: the order is the same on every device
}

i64 mass_partials(i64 stride) { return (stride + kPartial - 1) / kPartial; }

void set_targets(const Device& device, const i32* length, const RankRule& rule, const Budget& budget) {
  const Budget b = budget;
  for_each(device, b.rows.count(), [=] LACUNA_HD(i64 r) {
    const RowSlots at = row_slots(length, b.rows, r, rule.num_kv_heads);
    b.tokens[r] = rule.target.tokens(at.end);
    b.pairs[r] = capped_pairs(b.tokens[r], at.begin, at.end);
    b.rule[r] = static_cast<i32>(Rule::ranked);
    b.window_sinks[r] = b.window_recent[r] = 0;
  });
}

void follow_pairs(const Device& device, const i32* length, i32 num_kv_heads, const i64* before, const Budget& budget) {
  const Budget b = budget;
  for_each(device, b.rows.count(), [=] LACUNA_HD(i64 r) {
    if (b.pairs[r] == before[r]) return;
    const RowSlots at = row_slots(length, b.rows, r, num_kv_heads);
    b.tokens[r] = b.pairs[r] / (at.end - at.begin);
  });
}

namespace {
LACUNA_HD bool reads_all(const RankRule& rule, const Budget& b, i64 r, RowSlots at) {
  const Rule how = static_cast<Rule>(b.rule[r]);
  return how == Rule::full || (how == Rule::ranked && rule.target.limited() && b.tokens[r] >= at.end);
}
LACUNA_HD bool finite(float x) { return x - x == 0.f; }
}  // namespace

void count_rows(const Device& device, const i32* length, const RankRule& rule, const Budget& budget, const float* value,
                i64 stride, double* partial, const RankCounts& counts) {
  const Budget b = budget;
  const RankCounts c = counts;
  const i64 parts = mass_partials(stride);
  if (c.mass)
    for_each(device, b.rows.count() * parts, [=] LACUNA_HD(i64 i) {
      const i64 r = i / parts, begin = i % parts * kPartial;
      const RowSlots at = row_slots(length, b.rows, r, rule.num_kv_heads);
      const i64 n = (at.end + rule.unit_tokens - 1) / rule.unit_tokens,
                end = begin + kPartial < n ? begin + kPartial : n;
      double sum = 0;
      for (i64 u = begin; u < end; ++u)
        if (finite(value[r * stride + u])) sum += static_cast<double>(value[r * stride + u]);
      partial[i] = sum;
    });
  for_each(device, b.rows.count(), [=] LACUNA_HD(i64 r) {
    const RowSlots at = row_slots(length, b.rows, r, rule.num_kv_heads);
    const ForcedUnits forced(rule, at);
    c.units[r] = forced.units;
    c.wanted[r] = 0;
    c.floor[r] = 0;
    if (c.mass) c.mass[r] = 0;
    if (static_cast<Rule>(b.rule[r]) != Rule::ranked || reads_all(rule, b, r, at)) return;
    if (c.mass) {
      double whole = 0, held = 0;
      for (i64 p = 0; p < parts; ++p) whole += partial[r * parts + p];
      for (i64 u = 0; u < forced.units; ++u) {
        if (u == forced.first) u = forced.suffix;
        if (u < forced.units && finite(value[r * stride + u])) held += static_cast<double>(value[r * stride + u]);
      }
      c.mass[r] = product(rule.top_p, whole) - held;
      return;
    }
    const RankedCount count = ranked_count(rule, forced, at, b.tokens[r], b.pairs[r]);
    const i64 most = forced.units;
    c.wanted[r] = static_cast<i32>(count.units < 0 ? 0 : count.units < most ? count.units : most);
    c.floor[r] = count.floor;
  });
}

void mask_settled(const Device& device, const i32* length, const RankRule& rule, const Rows& rows, float* value,
                  i64 stride) {
  for_each(device, rows.count() * stride, [=] LACUNA_HD(i64 i) {
    const i64 r = i / stride, u = i % stride;
    const RowSlots at = row_slots(length, rows, r, rule.num_kv_heads);
    const ForcedUnits forced(rule, at);
    if (u < forced.units && forced.settled(rule, at, u)) value[i] = -INFINITY;
  });
}

void write_rows(const Device& device, const i32* length, const RankRule& rule, const Budget& budget, const i32* count,
                const Selection& selection) {
  const Budget b = budget;
  const Selection s = selection;
  const bool pieces = rule.unit_tokens > 1;
  const i64 capacity = pieces ? s.piece_capacity : s.token_capacity;
  i32* const lists = pieces ? s.pieces : s.tokens;
  for_each(device, b.rows.count() * capacity, [=] LACUNA_HD(i64 i) {
    const i64 r = i / capacity, place = i % capacity;
    const RowSlots at = row_slots(length, b.rows, r, rule.num_kv_heads);
    const ForcedUnits forced(rule, at);
    i64 unit = lists[i];
    if (place < forced.first)
      unit = place;
    else if (place >= forced.first + count[r])
      unit = forced.suffix + place - forced.first - count[r];
    if (place < forced.count() + count[r]) lists[i] = static_cast<i32>(unit * rule.unit_tokens);
  });
  for_each(device, b.rows.count(), [=] LACUNA_HD(i64 r) {
    const RowSlots at = row_slots(length, b.rows, r, rule.num_kv_heads);
    const ForcedUnits forced(rule, at);
    const bool all = reads_all(rule, b, r, at), window = static_cast<Rule>(b.rule[r]) == Rule::window;
    const i32 listed = all || window ? 0 : forced.count() + count[r];
    s.piece_count[r] = pieces ? listed : 0;
    s.token_count[r] = pieces ? 0 : listed;
    s.full[r] = all;
    s.exact_sinks[r] = all ? 0 : window ? b.window_sinks[r] : rule.sinks;
    s.exact_window[r] = all ? 0 : window ? b.window_recent[r] : rule.recent;
  });
}

void widen_exact(const Device& device, const Selection& selection, i32 sinks, i32 recent) {
  const Selection s = selection;
  for_each(device, s.rows.count(), [=] LACUNA_HD(i64 r) {
    if (s.exact_sinks[r] < sinks) s.exact_sinks[r] = sinks;
    if (s.exact_window[r] < recent) s.exact_window[r] = recent;
  });
}

namespace {
/// Several rows may name one slot; all of them store the same.
LACUNA_HD void store_one(float* at) {
#if defined(__CUDA_ARCH__)
  *at = 1.f;
#else
  __atomic_store_n(reinterpret_cast<u32*>(at), bits_of_float(1.f), __ATOMIC_RELAXED);
#endif
}
}  // namespace

void mark_members(const Device& device, const Selection& in, const Selection& out, bool tokens, float* member,
                  i64 stride) {
  const Selection from = in;
  const i64 capacity = tokens ? in.token_capacity : in.piece_capacity;
  const i32 group = in.rows.heads / out.rows.heads, tiles = in.rows.tiles;
  for_each(device, in.rows.count() * capacity, [=] LACUNA_HD(i64 i) {
    const i64 r = i / capacity;
    if (i % capacity >= (tokens ? from.token_count : from.piece_count)[r]) return;
    const i64 row = r / tiles / group * tiles + r % tiles;  // sequences hold whole groups
    store_one(member + row * stride + (tokens ? from.tokens : from.pieces)[i]);
  });
}

void unite_facts(const Device& device, const Selection& in, const Selection& out) {
  const Selection from = in, to = out;
  const i32 group = in.rows.heads / out.rows.heads, tiles = in.rows.tiles;
  for_each(device, to.rows.count(), [=] LACUNA_HD(i64 row) {
    i32 sinks = 0, window = 0, full = 0;
    for (i32 g = 0; g < group; ++g) {
      const i64 r = (row / tiles * group + g) * tiles + row % tiles;
      sinks = from.exact_sinks[r] > sinks ? from.exact_sinks[r] : sinks;
      window = from.exact_window[r] > window ? from.exact_window[r] : window;
      full |= from.full[r];
    }
    to.exact_sinks[row] = sinks;
    to.exact_window[row] = window;
    to.full[row] = full;
  });
}

void fill_rows(const Device& device, i32* values, i32 value, i64 n) {
  for_each(device, n, [=] LACUNA_HD(i64 i) { values[i] = value; });
}
void fill_floats(const Device& device, float* values, float value, i64 n) {
  for_each(device, n, [=] LACUNA_HD(i64 i) { values[i] = value; });
}

void spread_lists(const Device& device, const i32* length, const Rows& from, const i32* slot, const float* weight,
                  const i32* count, i64 stride, i32 num_kv_heads, const Selection& to) {
  const Selection s = to;
  const i32 group = to.rows.heads / from.heads, tiles = to.rows.tiles;
  const i64 capacity = to.token_capacity;
  for_each(device, to.rows.count() * capacity, [=] LACUNA_HD(i64 i) {
    const i64 r = i / capacity, place = i % capacity;
    const i64 source = r / tiles / group * tiles + r % tiles;
    const bool all = count[source] < 0;
    const i64 n = all ? row_slots(length, s.rows, r, num_kv_heads).end : count[source];
    if (place == 0) s.token_count[r] = static_cast<i32>(n);
    if (place >= n) return;
    s.tokens[i] = all ? static_cast<i32>(place) : slot[source * stride + place] & 0x7fffffff;
    if (s.token_log_weight) s.token_log_weight[i] = weight && !all ? weight[source * stride + place] : 0.f;
  });
}

void row_units(const Device& device, const i32* length, const Rows& rows, const RankRule& rule, i32* count) {
  for_each(device, rows.count(),
           [=] LACUNA_HD(i64 r) { count[r] = ForcedUnits(rule, row_slots(length, rows, r, rule.num_kv_heads)).units; });
}

void lift_ends(const Device& device, const i32* length, const Rows& rows, i32 num_kv_heads, i32 sinks, i32 recent,
               float* value, i64 stride) {
  const Rows of = rows;
  const float first = std::numeric_limits<float>::infinity();
  for_each(device, rows.count() * stride, [=] LACUNA_HD(i64 i) {
    const i64 slot = i % stride, n = length[of.kv_row(i / stride, num_kv_heads)];
    if (slot < n && (slot < sinks || slot >= n - recent)) value[i] = first;
  });
}

void scatter_floats(const Device& device, i64 rows, const i32* count, const float* in, i64 in_stride, const i32* slots,
                    i64 slots_stride, float* out, i64 out_stride) {
  for_each(device, rows * in_stride, [=] LACUNA_HD(i64 i) {
    const i64 r = i / in_stride, place = i % in_stride;
    if (place < count[r]) out[r * out_stride + slots[r * slots_stride + place]] = in[i];
  });
}

void unpack_cache(const Device& device, const Paged& kv, const Rewrite& rewrite) {
  const Paged cache = kv;
  const Rewrite to = rewrite;
  const i64 d = to.head_dim;
  for_each(device, to.rows * to.slots * d, [=] LACUNA_HD(i64 i) {
    const i64 c = i % d, slot = i / d % to.slots, row = i / d / to.slots;
    if (slot >= cache.length[row]) return;
    to.k[i] = cache.key(row, slot, c);
    to.v[i] = cache.value(row, slot, c);
  });
}

void settle_rewrite(const Device& device, const Rewrite& rewrite, u8* bad) {
  const Rewrite w = rewrite;
  const i64 d = w.head_dim;
  for_each(device, w.rows * w.slots, [=] LACUNA_HD(i64 i) {
    const i64 row = i / w.slots;
    bad[i] = 0;
    if (i % w.slots >= w.kept_count[row]) return;
    const i64 slot = w.kept[i];
    float *k = w.k + (row * w.slots + slot) * d, *v = w.v + (row * w.slots + slot) * d;
    for (i64 c = 0; c < d; ++c) {
      if (slot < w.channels_dropped_until[row] && w.drop_channel[row * d + c]) k[c] = 0;
      if (!finite(k[c]) || !finite(v[c])) bad[i] = 1;
    }
  });
}

void count_units(const Device& device, const i32* length, i32 rows, i32 unit_tokens, i32* end) {
  for_each(device, rows, [=] LACUNA_HD(i64 r) { end[r] = (length[r] + unit_tokens - 1) / unit_tokens; });
}

}  // namespace lacuna
