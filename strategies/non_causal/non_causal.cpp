// Non-causal attention inside chunks (kvpress' NonCausalAttnPress, a part of Chari and Van Durme 2025, "Compactor:
// calibrated query-agnostic KV cache compression with approximate leverage scores", arXiv 2507.08143)
//
//   A        = softmax of q . k, unscaled, over all `chunk` keys of the query's chunk, later ones too
//   score(j) = mean over j - 1, j, j + 1 of |v| (sum of A over the chunk's queries, reduced over the group),
//              less its mean over all heads and tokens, over its standard deviation
//   nothing forced.
//
// A partial last chunk has its own tokens only: kvpress pads its queries with zeros and, by a slip, its keys too.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/chunk_attention.hpp>

namespace {
using namespace lacuna::sdk;

struct NonCausal : Strategy {
  struct Params {
    i32 chunk = 256;
  } params;

  static void schema(Schema<Params>& s) { s.field("chunk", &Params::chunk, "tokens that attend to each other", "1.."); }
  static Info info() {
    Info i{};
    i.name = "non_causal";
    i.summary = "tokens ranked by full attention inside chunks";
    i.paper = "Chari and Van Durme 2025, arXiv 2507.08143";
    i.rule = "score(j) = avg3(|v_j| column sum of softmax(q.k) inside chunks), standardised over the layer";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"kvpress": {}})";
    i.dense_point = R"({"density": 1.0})";
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = common.gqa == Gqa::union_;
    const i64 seqs = c.call().num_seqs, heads = seqs * c.layer().num_qo_heads;
    p.workspace_bytes =
        chunk_attention_bytes(heads, heads, p.max_cached) + standardise_bytes(heads, p.max_cached, seqs);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i64 n = kv.max_length, stride = s.stride;
    const i32 heads_kv = c.layer().num_kv_heads;
    const Inner all{0, 0};
    float* attention = chunk_attention(c, rows, common.gqa, params.chunk, all);
    standardise(c, rows, n, all, attention);
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;
      if (slot < kv.length[rows.kv_row(row, heads_kv)]) value[row * stride + slot] = attention[i];
    });
    c.charge(8.0 * rows.count() * n, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(NonCausal)
