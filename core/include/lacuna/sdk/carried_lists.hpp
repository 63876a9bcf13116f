// Token lists that outlive the layer or step that made them. They hold original positions, so that they can be read
// where other tokens are cached: another KV head, or a layer that was evicted differently.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// count[i] ascending positions at position[i * stride]; count + 1 is stored, so that 0 says "never written".
struct PositionLists {
  i32 *filled, *position;
  i64 stride;

  LACUNA_HD bool written(i64 i) const { return filled[i] != 0; }
  LACUNA_HD i64 count(i64 i) const { return filled[i] - 1; }
  LACUNA_HD const i32* begin(i64 i) const { return position + i * stride; }
};

/// Lists carried from layer to layer (Context::carried).
inline PositionLists carried_lists(Context& c, i64 lists, i64 stride) {
  return {c.carried<i32>("filled", lists), c.carried<i32>("position", lists * stride), stride};
}

/// List i becomes the `count[i]` ascending slots of KV row kv_row(i) at slots[i * slots_stride].
template <class KvRow>
void store_slots(Context& c, const PositionLists& to, i64 lists, const i32* count, const i32* slots, i64 slots_stride,
                 KvRow kv_row) {
  const Paged kv = c.kv();
  const PositionLists out = to;
  c.for_each(lists * out.stride, [=] LACUNA_HD(i64 i) {
    const i64 list = i / out.stride, n = i % out.stride;
    if (n == 0) out.filled[list] = count[list] + 1;
    if (n < count[list]) out.position[i] = kv.position_of(kv_row(list), slots[list * slots_stride + n]);
  });
}

/// Every row of `s` becomes the tokens of list list(row) that are cached, and all cached tokens at positions from
/// `later` on; everything where the list was never written. `slots`: scratch, [rows, from.stride].
template <class List>
void write_lists(Context& c, const PositionLists& from, const Selection& s, i32* slots, i64 later, List list) {
  const Paged kv = c.kv();
  const PositionLists in = from;
  const Selection out = s;
  const Rows rows = s.rows;
  const i32 heads_kv = c.layer().num_kv_heads;
  const i64 count = rows.count();
  c.for_each(count * in.stride, [=] LACUNA_HD(i64 i) {
    const i64 row = i / in.stride, n = i % in.stride, kv_row = rows.kv_row(row, heads_kv);
    slots[i] = -1;
    if (n >= in.count(list(row))) return;
    const i32 position = in.begin(list(row))[n];
    const i32 slot = kv.visible(kv_row, position) - 1;
    if (position < later && slot >= 0 && kv.position_of(kv_row, slot) == position) slots[i] = slot;
  });
  c.for_each(count, [=] LACUNA_HD(i64 row) {
    const i64 kv_row = rows.kv_row(row, heads_kv);
    i32* const tokens = out.tokens + row * out.token_capacity;
    i32 n = 0;
    out.full[row] = !in.written(list(row));
    for (i64 i = row * in.stride; i < row * in.stride + in.count(list(row)); ++i)
      if (slots[i] >= 0) tokens[n++] = slots[i];
    for (i32 slot = kv.visible(kv_row, later - 1); slot < kv.length[kv_row] && !out.full[row]; ++slot)
      tokens[n++] = slot;
    out.token_count[row] = n;
  });
  const double listed = static_cast<double>(count) * static_cast<double>(in.stride);
  c.charge(12.0 * listed, 0);
}

}  // namespace lacuna::sdk
