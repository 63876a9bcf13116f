// SimLayerKV (Zhang et al. 2024, "SimLayerKV: a simple framework for layer-level KV cache reduction", arXiv 2410.13846)
//
//   A    = softmax of the last query over the L tokens before the cut, mean over all query heads
//   lazy = A[first `sinks`] + A[last `recent` before the query's own token] > threshold
//   a lazy layer keeps its first `sinks` and its last recent - 1 tokens, the newest included (the next token takes the
//   place that is left); every other layer keeps everything. No cut where L <= sinks + recent + 1.
//
// Decided for a whole layer, from the last row of the prompt as kvpress does; the authors decide from the first
// generated token's row and keep `recent` tokens. threshold = 1 is off; the presets are the values published for each
// family of models.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct SimLayerKv : Strategy {
  struct Params {
    double threshold = 1;
    i32 sinks = 4, recent = 1024;
  } params;

  static void schema(Schema<Params>& s) {
    s.knob("threshold", &Params::threshold, "a layer is lazy where sinks and window hold more mass; 1: off", "0..1")
        .field("sinks", &Params::sinks, "first tokens of a lazy layer", "0..")
        .field("recent", &Params::recent, "last tokens of a lazy layer, the next one included", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "simlayerkv";
    i.summary = "layers whose last query looks at sinks and a window only keep nothing else";
    i.paper = "Zhang et al. 2024, arXiv 2410.13846";
    i.rule = "lazy = mass of the last row on first `sinks` and last `recent` > threshold; lazy layers keep only these";
    i.phases = kEvict;
    i.presets = R"({"llama2": {"threshold": 0.65}, "llama3": {"threshold": 0.9}, "mistral": {"threshold": 0.8},
      "qwen": {"threshold": 0.85}})";
    i.dense_point = R"({"threshold": 1.0})";
    i.query_aware = 1;
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.workspace_bytes = rows * p.max_cached * 4 + rows * 8 + c.call().num_seqs * 4 + 3 * 256;
  }

  void allocate_rows(Context& c, const Scores*, Budget& b) override {
    if (params.threshold >= 1) return give_everything(c, b);
    const Paged kv = c.kv();
    const Queries q = c.last_queries(1);
    const Rows rows = b.rows;
    const i64 heads = q.heads, group = c.layer().group(), n = kv.max_length, own = q.first_position;
    const i32 heads_kv = c.layer().num_kv_heads, sinks = params.sinks, recent = params.recent;
    const double threshold = params.threshold;
    float* mass = c.workspace<float>(q.seqs * heads * n);
    double* held = c.workspace<double>(q.seqs * heads);  // by sinks and window, of one head
    i32* lazy = c.workspace<i32>(q.seqs);
    c.window_mass(q, Reduce::sum, mass, nullptr, n);
    c.for_each(q.seqs * heads, [=] LACUNA_HD(i64 row) {
      const i64 before = kv.visible(row / group, own - 1), window = before - recent;
      double sum = 0;
      for (i64 slot = 0; slot < sinks && slot < before; ++slot) sum += static_cast<double>(mass[row * n + slot]);
      for (i64 slot = window > sinks ? window : sinks; slot < before; ++slot)
        sum += static_cast<double>(mass[row * n + slot]);
      held[row] = sum;
    });
    c.for_each(q.seqs, [=] LACUNA_HD(i64 seq) {
      double sum = 0;
      for (i64 h = 0; h < heads; ++h) sum += held[seq * heads + h];
      lazy[seq] = sum / static_cast<double>(heads) > threshold;
    });
    i32 *rule = b.rule, *window_sinks = b.window_sinks, *window_recent = b.window_recent;
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const bool cut = lazy[rows.seq_of(row)] && kv.length[rows.kv_row(row, heads_kv)] > i64{sinks} + recent + 1;
      rule[row] = static_cast<i32>(cut ? Rule::window : Rule::full);
      window_sinks[row] = sinks;
      window_recent[row] = recent - 1;
    });
    const double read = static_cast<double>(q.seqs * heads) * static_cast<double>(i64{sinks} + recent);
    c.charge(4.0 * read, read);
  }

  void give_everything(Context& c, Budget& b) const {
    i32* rule = b.rule;
    c.for_each(b.rows.count(), [=] LACUNA_HD(i64 row) { rule[row] = static_cast<i32>(Rule::full); });
  }
};
}  // namespace

LACUNA_PLUGIN(SimLayerKv)
