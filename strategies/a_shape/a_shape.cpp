// A-shape (Jiang et al. 2024, "MInference 1.0", arXiv 2407.02490: the streaming pattern of its prefill)
//
//   the query at i reads every token j < sinks and every one with i - j < window, itself included, as an exact mask;
//   a prompt of at most `window` tokens is dense.
// Preset minference_search: the sizes that MInference's pattern search tries.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct AShape : Strategy {
  struct Params {
    i32 sinks = 128, window = 3968;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("sinks", &Params::sinks, "first tokens that are always read", "0..")
        .field("window", &Params::window, "last tokens that a query reads, itself included", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "a_shape";
    i.summary = "the first tokens and a window up to each query";
    i.paper = "Jiang et al. 2024, arXiv 2407.02490";
    i.rule = "query i reads j < sinks or i - j < window";
    i.phases = kPrefill;
    i.presets = R"({"original": {}, "minference_search": {"sinks": 100, "window": 800}})";
    i.dense_point = R"({"window": 2147483647})";
    i.takes_budget = 0;
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.per_query_head = 0;             // all heads read alike
    p.max_pieces = p.max_tokens = 0;  // exact sinks and window need no lists
  }

  void mark(Context& c, const Budget&, Selection& s) override {
    i32 *sinks_of = s.exact_sinks, *window_of = s.exact_window;
    const i32 sinks = params.sinks, window = params.window;
    c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) {
      sinks_of[row] = sinks;
      window_of[row] = window;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(AShape)
