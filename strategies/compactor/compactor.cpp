// Compactor (Chari and Van Durme 2025, "Compactor: calibrated query-agnostic KV cache compression with approximate
// leverage scores", arXiv 2507.08143), as kvpress states it
//
//   the first `head` and last `tail` tokens are kept; of the others, on their own:
//     l(j) = leverage of the centred keys before RoPE (strategy `leverage`, exact)
//     a(j) = attention inside chunks of 256 tokens, later ones too (strategy `non_causal`)
//     score(j) = beta z(l(j)) + z(a(j)),   z: less the mean over all heads and tokens, over the standard deviation
//   beta = -1: the share of the tokens that is to go (.35 without a budget).
//
// The authors' own code differs: chunks of 128, leverage inside chunks of 512, no value norm, no pooling.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/chunk_attention.hpp>
#include <lacuna/sdk/key_leverage.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i64 kChunk = 256;

struct Compactor : Strategy {
  struct Params {
    i32 head = 8, tail = 4;
    double beta = -1;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("head", &Params::head, "first tokens kept and left out of the scores", "0..")
        .field("tail", &Params::tail, "last tokens kept and left out of the scores", "0..")
        .field("beta", &Params::beta, "weight of the leverage; -1: the share of the tokens that is to go", "-1..");
  }
  static Info info() {
    Info i{};
    i.name = "compactor";
    i.summary = "tokens ranked by key leverage and by attention inside chunks";
    i.paper = "Chari and Van Durme 2025, arXiv 2507.08143";
    i.rule = "score(j) = beta z(leverage of k_j) + z(chunk attention on j |v_j|); head and tail kept";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"kvpress": {}})";
    i.dense_point = R"({"density": 1.0})";
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = common.gqa == Gqa::union_;
    p.sinks = p.sinks > params.head ? p.sinks : params.head;
    p.recent = p.recent > params.tail ? p.recent : params.tail;
    const Layer& l = c.layer();
    const i64 seqs = c.call().num_seqs, heads = seqs * l.num_qo_heads, n = p.max_cached;
    p.workspace_bytes = key_leverage_bytes(seqs * l.num_kv_heads, n, l.head_dim, 0) +
                        chunk_attention_bytes(heads, heads, n) + 2 * standardise_bytes(heads, n, seqs);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 n = kv.max_length, stride = s.stride;
    const Inner inner{params.head, params.tail};
    Rows kv_heads = rows;
    kv_heads.heads = heads_kv;
    kv_heads.per_query_head = 0;
    float* leverage = key_leverage(c, 0, inner);
    standardise(c, kv_heads, n, inner, leverage);
    float* attention = chunk_attention(c, rows, common.gqa, kChunk, inner);
    standardise(c, rows, n, inner, attention);
    const double removed =
        s.budget_tokens < 0 ? .35 : 1 - static_cast<double>(s.budget_tokens) / static_cast<double>(n);
    const double beta = params.beta < 0 ? removed : params.beta;
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv);
      if (!inner.holds(slot, kv.length[kv_row])) return;
      value[row * stride + slot] = static_cast<float>(beta * leverage[kv_row * n + slot] + attention[i]);
    });
    c.charge(12.0 * rows.count() * n, 2.0 * rows.count() * n);
  }
};
}  // namespace

LACUNA_PLUGIN(Compactor)
