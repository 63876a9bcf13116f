// Tri-shape (Li et al. 2024, "SCBench: a KV cache-centric analysis of long-context methods", arXiv 2412.10319)
//
//   A-shape: the query at i reads every token j < sinks and every one with i - j < window, itself included;
//   the prompt's last `last_dense` queries read everything. Both borders are exact to the token.
// Preset triangle_mix: the sizes of TriangleMix (He et al. 2025, arXiv 2507.21526), which leaves the layers below 16
// dense.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct TriShape : Strategy {
  struct Params {
    i32 sinks = 128, window = 3968, last_dense = 100;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("sinks", &Params::sinks, "first tokens that are always read", "0..")
        .field("window", &Params::window, "last tokens that a query reads, itself included", "1..")
        .field("last_dense", &Params::last_dense, "last queries of the prompt that read everything", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "tri_shape";
    i.summary = "the first tokens and a window up to each query, the prompt's last queries dense";
    i.paper = "Li et al. 2024, arXiv 2412.10319";
    i.rule = "query i reads j < sinks or i - j < window; the last `last_dense` queries read everything";
    i.phases = kPrefill;
    i.presets = R"({"original": {}, "triangle_mix": {"sinks": 8, "window": 512, "last_dense": 128,
      "dense_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}})";
    i.dense_point = R"({"window": 2147483647})";
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;             // all heads read alike
    p.max_pieces = p.max_tokens = 0;  // exact parts and whole rows need no lists
    const i64 count = c.current_queries().count, border = count - params.last_dense;
    p.q_tile = 64;
    while (border > 0 && border < count && border % p.q_tile != 0) p.q_tile /= 2;  // a tile is of one kind
  }

  void mark(Context& c, const Budget&, Selection& s) override {
    const Rows rows = s.rows;
    i32 *sinks_of = s.exact_sinks, *window_of = s.exact_window, *full = s.full;
    const i32 sinks = params.sinks, window = params.window;
    const i64 border = rows.num_queries - params.last_dense;
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      sinks_of[row] = sinks;
      window_of[row] = window;
      full[row] = rows.query_begin(row) >= border;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(TriShape)
