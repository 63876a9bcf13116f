// H2O (Zhang et al. 2023, "H2O: heavy-hitter oracle for efficient generative inference of large language models",
// arXiv 2306.14048)
//
//   sum(j) += attention that token j received, from every query that read it, prompt and decode; carried across cuts
//   after the prompt and after each decode step, once longer than C (fixed at the cut):
//     keep the most recent C - floor(heavy * C) tokens, the current one included, and of the older ones those with the
//     largest sums.
//   normalise: kvpress' ObservedAttention: one cut, rank by sum(j) / (queries that could see j), nothing forced.
//
// Sums are kept per query head (the original has no GQA) and reduced over the group when they rank.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct H2o : Strategy {
  struct Params {
    double heavy = .5;
    bool normalise = false;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("heavy", &Params::heavy, "share of the budget for heavy hitters; the rest is recent", "0..1")
        .field("normalise", &Params::normalise, "mean instead of sum, no recent tokens forced, one cut");
  }
  static Info info() {
    Info i{};
    i.name = "h2o";
    i.summary = "tokens ranked by all the attention they have received, beside the recent ones";
    i.paper = "Zhang et al. 2023, arXiv 2306.14048";
    i.rule = "sum(j) += attention received; keep the recent C - floor(heavy C) and the largest sums of the older";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"original": {}, "kvpress": {"normalise": true}})";
    i.dense_point = R"({"normalise": true, "density": 1.0})";  // the sum form cuts back to C at every step
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.evict_every = params.normalise ? 0 : 1;
    p.sides[p.num_sides++] = {"mass", SidePer::token, 1, Dtype::f32, c.layer().group(), 1};
    p.workspace_bytes = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads * p.max_cached * 4 + 256;
  }

  void attended(Context& c, const Attended& a) override {
    const auto mass = c.side<float>("mass");
    const Paged kv = c.kv();
    const i64 heads = c.layer().num_qo_heads, group = c.layer().group(), n = kv.max_length;
    const i64 rows = c.call().num_seqs * heads,
              arrived = a.queries.first_position;  // tokens from here on have no sum yet
    float* received = c.workspace<float>(rows * n);
    c.read_mass(a, received, n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 kv_row = i / n / group, slot = i % n;
      if (slot >= kv.length[kv_row]) return;
      float& sum = mass.at(kv_row, slot, i / n % group);
      sum = kv.position_of(kv_row, slot) >= arrived ? received[i] : sum + received[i];
    });
    c.charge(12.0 * rows * n, 1.0 * rows * n);
  }

  void score(Context& c, Scores& s) override {
    const auto mass = c.side<float>("mass");
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 group = c.layer().group(), n = s.units, stride = s.stride, budget = s.budget_tokens;
    const bool normalise = params.normalise;
    const i64 recent =
        normalise || budget < 0 ? 0 : budget - static_cast<i64>(params.heavy * static_cast<double>(budget) + 1e-9);
    const i64 seen = c.last_queries(1).first_position + 1;
    const float first = INFINITY;
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv), length = kv.length[kv_row];
      if (slot >= length) return;
      float v = mass.at(kv_row, slot, rows.head_of(row) % group);
      if (normalise) v /= static_cast<float>(seen - kv.position_of(kv_row, slot));
      value[row * stride + slot] = slot >= length - recent ? first : v;
    });
    c.charge(8.0 * rows.count() * n, normalise ? 1.0 * rows.count() * n : 0.0);
  }
};
}  // namespace

LACUNA_PLUGIN(H2o)
