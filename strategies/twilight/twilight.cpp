// Twilight (Lin et al. 2025, "Twilight: adaptive attention sparsity with hierarchical top-p pruning", arXiv 2502.02770)
//
//   k~ = the key in 4 bits a channel, min-max per token and KV head                    (side data)
//   base strategy, at a loose budget, gives a set B per query head (the original: Quest's pages up to 8192 tokens)
//   p = softmax over B of q . k~ * softmax_scale
//   final = the smallest part of B, in descending p, whose mass reaches top_p (the crossing token included); with a
//   budget, at most that many tokens. Attention uses the exact keys.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/four_bit_keys.hpp>

namespace {
using namespace lacuna::sdk;

struct Twilight : Strategy {
  struct Params {
    Base base{R"({"name": "quest", "density": 0.25})"};
    double top_p = 0.85;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy whose choice is narrowed, at its own loose budget")
        .knob("top_p", &Params::top_p, "share of the base's estimated mass that is kept", "0..1");
  }
  static Info info() {
    Info i{};
    i.name = "twilight";
    i.summary = "top-p of another strategy's choice, on 4-bit keys";
    i.paper = "Lin et al. 2025, arXiv 2502.02770";
    i.rule = "softmax over the base's tokens of q . 4-bit key; the smallest set with mass >= top_p";
    i.phases = kDecode;
    i.defaults = R"({"dense_layers": [0, 1]})";
    i.dense_point = R"({"base": {"name": "dense"}, "top_p": 1.0, "dense_layers": []})";
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    p.max_pieces = 0;
    FourBitKeys::plan(p, l.head_dim);
    const i64 rows = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads;
    p.workspace_bytes = 4 * rows * (3 * p.max_cached + 5) + 8 * 256;
  }

  void index(Context& c, const Dirty& dirty) override { encode_keys(c, dirty); }

  void refine(Context& c, const Budget& b, Selection& s) override {
    const FourBitKeys keys(c);
    const Queries q = c.current_queries();
    const Selection out = s;
    const Budget budget = b;
    const Rows rows = s.rows;
    const i32 kv_heads = c.layer().num_kv_heads, count = static_cast<i32>(rows.count());
    const float softmax_scale = c.layer().softmax_scale;
    const i64 d = q.head_dim, stride = c.kv().max_length;
    float *mass = c.workspace<float>(count * stride), *peak = c.workspace<float>(count);
    i32 *base = c.workspace<i32>(count * stride), *taken = c.workspace<i32>(count * stride),
        *size = c.workspace<i32>(count);
    i32 *limit = c.workspace<i32>(count), *one = c.workspace<i32>(count), *best = c.workspace<i32>(count);

    c.for_each(count * stride, [=] LACUNA_HD(i64 i) {
      const i64 row = i / stride, n = i % stride, kv_row = rows.kv_row(row, kv_heads);
      if (n >= out.token_count[row]) return;
      const i32 slot = out.tokens[row * out.token_capacity + n];
      const float logit =
          keys.dot(kv_row, slot, d, [=](i64 e) { return q.at(rows.seq_of(row), rows.head_of(row), 0, e); });
      base[i] = slot;
      mass[i] = logit * softmax_scale;
    });
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 most = budget.limited ? budget.tokens[row] : out.token_count[row];
      limit[row] = static_cast<i32>(most > 1 ? most : 1);
      one[row] = 1;
    });
    c.topk(mass, count, stride, out.token_count, one, best, size, 1);
    c.for_each(count, [=] LACUNA_HD(i64 row) { peak[row] = mass[row * stride + best[row]]; });
    c.for_each(count * stride, [=] LACUNA_HD(i64 i) {
      if (i % stride < out.token_count[i / stride])
        mass[i] = expf(mass[i] - peak[i / stride]);  // top-p divides by the sum
    });
    c.topp(mass, count, stride, out.token_count, limit, params.top_p, taken, size, stride);
    c.for_each(count * stride, [=] LACUNA_HD(i64 i) {
      const i64 row = i / stride, n = i % stride;
      if (n < size[row]) out.tokens[row * out.token_capacity + n] = base[row * stride + taken[i]];
    });
    c.for_each(count, [=] LACUNA_HD(i64 row) { out.token_count[row] = size[row]; });
    // At most the whole cache: how many tokens the base chose is known on the device only.
    const double scored = static_cast<double>(count) * static_cast<double>(stride);
    c.charge(scored / c.layer().group() * FourBitKeys::bytes(d), 4.0 * scored * d);
  }
};
}  // namespace

LACUNA_PLUGIN(Twilight)
