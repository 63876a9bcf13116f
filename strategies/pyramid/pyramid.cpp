// PyramidKV (Cai et al. 2024, "PyramidKV: dynamic KV cache compression based on pyramidal information funneling",
// arXiv 2406.02069): budgets fall linearly from the first layer to the last.
//
//   C = mean target of a head, w = its forced tokens, L = tokens before the cut, N = layers
//   integer:  b = C - w;  low = b div beta;  high = 2b - low;  if high >= L - w: high = L - w, low = 2b - high
//             layer l gets high - l * ((high - low) div (N - 1)) + w        (all C where L < C or L < 2b)
//   kvpress:  the same in real numbers with b = C, and the result, rounded half to even, includes the window;
//             all C unless L >= high >= low >= w
//
// `integer` is KVCache-Factory's rule: its divisions lose a few tokens, so the mean differs a little from C.
#include <cmath>
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Pyramid : Strategy {
  struct Params {
    i32 beta = 20;
    std::string rule = "integer";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("beta", &Params::beta, "the last layer gets 1/beta of the mean budget", "1..")
        .field("rule", &Params::rule, "arithmetic of KVCache-Factory or of kvpress", "integer|kvpress");
  }
  static Info info() {
    Info i{};
    i.name = "pyramid";
    i.summary = "budgets fall linearly from the first layer to the last";
    i.paper = "Cai et al. 2024, arXiv 2406.02069";
    i.rule = "layer l gets high - l (high - low) / (N - 1), low = b / beta, high = 2b - low, b = the mean target";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    return i;
  }

  void allocate_layers(Context&, LayerBudget& b) override {
    if (b.num_layers < 2 || b.cached_tokens < b.mean_tokens) return;
    if (params.rule == "integer")
      integer_rule(b);
    else
      kvpress_rule(b);
  }

  void integer_rule(LayerBudget& out) const {
    const i64 window = out.forced_tokens, rest = out.cached_tokens - window, b = out.mean_tokens - window;
    if (b <= 0 || out.cached_tokens < 2 * b) return;
    i64 low = b / params.beta, high = 2 * b - low;
    if (high >= rest) {
      high = rest;
      low = 2 * b - high;
    }
    const i64 step = (high - low) / (out.num_layers - 1);
    for (i32 l = 0; l < out.num_layers; ++l) out.tokens[l] = static_cast<double>(high - l * step + window);
  }

  void kvpress_rule(LayerBudget& out) const {
    const double window = static_cast<double>(out.forced_tokens), cached = static_cast<double>(out.cached_tokens);
    const double b = static_cast<double>(out.mean_tokens);
    double low = b / params.beta, high = 2 * b - low;
    if (high >= cached - window) {
      high = cached - window;
      low = 2 * b - high;
    }
    if (!(cached >= high && high >= low && low >= window)) return;
    const double step = (high - low) / (out.num_layers - 1);
    for (i32 l = 0; l < out.num_layers; ++l) out.tokens[l] = std::nearbyint(high - l * step);
  }
};
}  // namespace

LACUNA_PLUGIN(Pyramid)
