// TOVA (Oren et al. 2024, "Transformers are multi-state RNNs", arXiv 2401.06104)
//
//   score(j) = softmax of the last query over the cached keys at token j, mean over all query heads of the layer
//   after the prompt and after each decode step, once longer than C (fixed at the cut):
//     every KV head keeps the same C best tokens; the current one competes and may go.
//   force_current (kvpress): the current token is kept, inside C.
//
// gqa says how the layer's query heads are reduced (max, or else the mean); `union` has nothing to unite.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Tova : Strategy {
  struct Params {
    bool force_current = false;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("force_current", &Params::force_current, "the current token is kept instead of competing");
  }
  static Info info() {
    Info i{};
    i.name = "tova";
    i.summary = "tokens ranked by the last query's attention, one set for the layer";
    i.paper = "Oren et al. 2024, arXiv 2401.06104";
    i.rule = "score(j) = mean over all query heads of the last row of softmax; the C best after every step";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"original": {}, "kvpress": {"force_current": true}})";
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = 0;
    p.evict_every = 1;
    if (params.force_current && p.recent < 1) p.recent = 1;
    p.workspace_bytes = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads * p.max_cached * 4 + 256;
  }

  void score(Context& c, Scores& s) override {
    const Queries q = c.last_queries(1);
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i64 heads_kv = c.layer().num_kv_heads, group = c.layer().group(), n = kv.max_length, stride = s.stride;
    const bool max = common.gqa == Gqa::max;
    const double share = common.gqa == Gqa::sum ? 1.0 : 1.0 / static_cast<double>(q.heads);
    float* mass = c.workspace<float>(static_cast<i64>(q.seqs) * q.heads * n);
    c.window_mass(q, Reduce::sum, mass, nullptr, n);
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot >= kv.length[row]) return;
      const i32 position = kv.position_of(row, slot);
      double sum = 0;
      float best = 0.f;
      for (i64 other = row / heads_kv * heads_kv; other < (row / heads_kv + 1) * heads_kv; ++other) {
        // An allocator may have left the heads different tokens.
        const i64 at = other == row ? slot : kv.visible(other, position) - 1;
        if (at < 0 || kv.position_of(other, at) != position) continue;
        for (i64 head = other * group; head < (other + 1) * group; ++head) {
          const float v = mass[head * n + at];
          sum += v;
          best = v > best ? v : best;
        }
      }
      value[row * stride + slot] = max ? best : static_cast<float>(sum * share);
    });
    c.charge(4.0 * q.heads * rows.count() * n, 1.0 * q.heads * rows.count() * n);
  }
};
}  // namespace

LACUNA_PLUGIN(Tova)
