// Leverage scores (kvpress' LeveragePress, a part of Chari and Van Durme 2025, "Compactor: calibrated query-agnostic KV
// cache compression with approximate leverage scores", arXiv 2507.08143)
//
//   x_j      = key before RoPE less the mean key; `sketch` m > 0: times a Gaussian [d, m] over sqrt(m), seeded
//   score(j) = x_j^T (sum x x^T + 0.01 I)^-1 x_j, less its mean over all heads and tokens, over its standard deviation
//   nothing forced.
//
// Exact by default; kvpress sketches 48 columns (preset), which makes the scores depend on the seed.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/key_leverage.hpp>

namespace {
using namespace lacuna::sdk;

struct Leverage : Strategy {
  struct Params {
    i32 sketch = 0;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("sketch", &Params::sketch, "columns of a random projection of the keys; 0: exact", "0..4096");
  }
  static Info info() {
    Info i{};
    i.name = "leverage";
    i.summary = "tokens ranked by the statistical leverage of their key";
    i.paper = "Chari and Van Durme 2025, arXiv 2507.08143";
    i.rule = "score(j) = x_j^T (X^T X + 0.01 I)^-1 x_j of the centred keys before RoPE, standardised over the layer";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"kvpress": {"sketch": 48}})";
    i.dense_point = R"({"density": 1.0})";
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = 0;
    const i64 seqs = c.call().num_seqs, rows = seqs * c.layer().num_kv_heads;
    p.workspace_bytes = key_leverage_bytes(rows, p.max_cached, c.layer().head_dim, params.sketch) +
                        standardise_bytes(rows, p.max_cached, seqs);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride;
    const Inner all{0, 0};
    float* leverage = key_leverage(c, params.sketch, all);
    standardise(c, s.rows, n, all, leverage);
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot < kv.length[row]) value[row * stride + slot] = leverage[i];
    });
    c.charge(8.0 * rows * n, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(Leverage)
