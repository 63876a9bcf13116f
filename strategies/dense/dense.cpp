// Dense attention through the sparse path: the baseline that every selection is compared with.
//
//   select: every visible cell of every row      evict: every cached token stays
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Dense : Strategy {
  static Info info() {
    Info i{};
    i.name = "dense";
    i.summary = "everything: full attention, nothing evicted";
    i.paper = "-";
    i.rule = "select: every visible cell; evict: every cached token stays";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = "{}";
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.max_pieces = 0;
    if (c.call().purpose == Purpose::select) p.max_tokens = 0;  // `full` needs no lists
  }

  void mark(Context& c, const Budget&, Selection& s) override {
    i32* full = s.full;
    c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) { full[row] = 1; });
  }

  void retain(Context& c, const Budget&, Kept& kept) override {
    const Selection set = kept.set;
    const Paged kv = c.kv();
    const i32 kv_heads = c.layer().num_kv_heads;
    const i64 slots = kv.max_length;
    c.for_each(set.rows.count() * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots;
      const i32 length = kv.length[set.rows.kv_row(row, kv_heads)];
      if (slot == 0) set.token_count[row] = length;
      if (slot < length) set.tokens[row * set.token_capacity + slot] = static_cast<i32>(slot);
    });
  }
};
}  // namespace

LACUNA_PLUGIN(Dense)
