// Sharing of a choice, as many methods do in one direction or another (TidalDecode and OmniKV over layers, LServe over
// steps, HShare over all three): what is lost when a base strategy's choice is used again.
//
//   the base chooses at every `steps`-th decode step, in every layer whose number is a multiple of `layers`, for every
//   `heads`-th query head; other steps, layers and heads read the last choice before them
//   a choice of an earlier step: the tokens that came since are read besides
//   where the layer that chooses is dense, those that follow it read everything
//
// The core asks the base at every step and layer, so its work is charged there too. Positions are remembered, so that
// heads and layers may have evicted different tokens before.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/carried_lists.hpp>

namespace {
using namespace lacuna::sdk;

struct Reuse : Strategy {
  struct Params {
    Base base;
    i32 steps = 1, layers = 1, heads = 1;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy whose choice is shared, with its own budget")
        .field("steps", &Params::steps, "decode steps that share a choice", "1..")
        .field("layers", &Params::layers, "model layers that share a choice", "1..")
        .field("heads", &Params::heads, "query heads that share a choice", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "reuse";
    i.summary = "another strategy's choice shared over steps, layers or heads";
    i.paper = "-";
    i.rule = "every steps-th step, layers-th layer and heads-th head: the base's choice; the others: the last one";
    i.phases = kDecode;
    i.dense_point = R"({"base": {"name": "dense"}})";
    i.takes_budget = 0;
    i.wrapper = 1;
    i.needs = kNeedsAllLayers;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.max_pieces = 0;
    const i64 heads = c.layer().num_qo_heads, rows = c.call().num_seqs * heads;
    capacity_ = p.max_cached;
    if (params.steps > 1) {
      p.states[p.num_states++] = {"filled", Dtype::i32, heads};
      p.states[p.num_states++] = {"position", Dtype::i32, heads * capacity_};
    }
    p.workspace_bytes = 4 * rows * (2 * capacity_ + 1) + 3 * 256;
  }

  void refine(Context& c, const Budget&, Selection& s) override {
    const i64 rows = s.rows.count(), length = c.last_queries(1).first_position + 1;
    const i64 age = c.call().step % params.steps;
    const auto same = [=] LACUNA_HD(i64 row) { return row; };
    i32* slots = c.workspace<i32>(rows * capacity_);
    if (c.layer().index % params.layers != 0)
      return write_lists(c, carried_lists(c, rows, length), s, slots, length, same);
    if (age > 0)
      write_lists(c, PositionLists{c.state<i32>("filled"), c.state<i32>("position"), capacity_}, s, slots, length - age,
                  same);
    else if (params.heads > 1)
      share_heads(c, s, slots);
    if (age == 0 && params.steps > 1)
      store(c, PositionLists{c.state<i32>("filled"), c.state<i32>("position"), capacity_}, s);
    if (params.layers > 1) store(c, carried_lists(c, rows, length), s);
  }

  void store(Context& c, const PositionLists& to, const Selection& s) const {
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    store_slots(c, to, rows.count(), s.token_count, s.tokens, s.token_capacity,
                [=] LACUNA_HD(i64 row) { return rows.kv_row(row, heads_kv); });
  }

  void share_heads(Context& c, Selection& s, i32* slots) const {
    const i64 rows = s.rows.count(), heads = s.rows.heads, shared = params.heads;
    const PositionLists lists{c.workspace<i32>(rows), c.workspace<i32>(rows * capacity_), capacity_};
    store(c, lists, s);
    write_lists(c, lists, s, slots, c.last_queries(1).first_position + 1,
                [=] LACUNA_HD(i64 row) { return row - row % heads % shared; });
  }

 private:
  i64 capacity_ = 0;  // tokens of a list
};
}  // namespace

LACUNA_PLUGIN(Reuse)
