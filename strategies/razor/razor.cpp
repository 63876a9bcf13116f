// RazorAttention (Tang et al. 2024, "RazorAttention: efficient KV cache compression through retrieval heads",
// arXiv 2407.15891)
//
//   calibration, on a trace of one token and then `period` random tokens, repeated: for the pairs of a query and an
//   earlier copy of its token, echo = mean attention on the copy, induction = mean attention on the token after it;
//   the largest over the GQA group
//   retrieval heads: the round(echo * KV heads of the model) best by echo and the same of induction, ties to the lower
//   layer, then to the lower head; or those that a class table names. They keep everything.
//   any other head keeps its first `sinks` tokens, the mean of K (after RoPE) and V of those that it drops, and the
//   last capacity - sinks - 1: `capacity` in all.
//
// Sizes are those of Huawei's golden-stick. The mean stands in the slot of the newest token that is dropped, at its
// position, and weighs as one token, as there.
#include <algorithm>
#include <cmath>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/head_set.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i32 kMaxLayers = 160;

/// One calibrated score of every KV head of the model.
struct HeadScores {
  const float* of_layer[kMaxLayers] = {};  // null: a layer without
  i32 layers = 0, heads = 0;

  LACUNA_HD i64 known() const {
    i64 n = 0;
    for (i32 l = 0; l < layers; ++l) n += of_layer[l] ? heads : 0;
    return n;
  }
  /// Heads that come before this one.
  LACUNA_HD i64 rank(i32 layer, i64 head) const {
    const float own = of_layer[layer][head];
    i64 before = 0;
    for (i32 l = 0; l < layers; ++l)
      for (i64 h = 0; of_layer[l] && h < heads; ++h) {
        const float other = of_layer[l][h];
        before += other > own || (other == own && (l < layer || (l == layer && h < head)));
      }
    return before;
  }
};

struct Razor : Strategy {
  struct Params {
    Classes classes;
    Data scores;
    i32 sinks = 4, capacity = 256, period = 2500;
    double echo = .01, induction = .14;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("classes", &Params::classes, "retrieval KV heads by layer: [layer.3] full = [0, 2]")
        .field("scores", &Params::scores, "echo and induction scores, from lacuna calibrate (beside the classes)")
        .field("sinks", &Params::sinks, "first tokens of a head that is no retrieval head", "0..")
        .field("capacity", &Params::capacity, "tokens of such a head: sinks, the mean token, recent ones", "2..")
        .field("echo", &Params::echo, "share of the model's KV heads taken by echo score", "0..1")
        .field("induction", &Params::induction, "share of the model's KV heads taken by induction score", "0..1")
        .field("period", &Params::period, "calibration: tokens that repeat after the first one", "2..")
        .require("sinks, capacity", "capacity exceeds sinks", [](const Params& p) { return p.capacity > p.sinks; });
  }
  static Info info() {
    Info i{};
    i.name = "razor";
    i.summary = "retrieval heads keep everything, the others sinks, a window and the mean of what they drop";
    i.paper = "Tang et al. 2024, arXiv 2407.15891";
    i.rule = "retrieval heads: full; the others: first `sinks`, the mean of the dropped, the last of `capacity`";
    i.phases = kEvict;
    i.dense_point = R"({"capacity": 1000000000})";
    i.takes_budget = 0;
    return i;
  }

  HeadScores head_scores(Context& c, const char* name) const {
    HeadScores out;
    out.layers = c.layer().num_layers;
    out.heads = c.layer().num_kv_heads;
    if (out.layers > kMaxLayers)
      throw Failure("scores: " + std::to_string(out.layers) + " layers, expected at most " +
                    std::to_string(kMaxLayers));
    for (i32 l = 0; params.scores.given() && l < out.layers; ++l) {
      const Array a = c.data("scores", name, l);
      if (a.data && (a.rank != 1 || a.extent[0] != out.heads))
        throw Failure("scores: '" + std::string(name) + "' of layer " + std::to_string(l) +
                      " has another number of values than there are KV heads");
      out.of_layer[l] = static_cast<const float*>(a.data);
    }
    return out;
  }

  void allocate_rows(Context& c, const Scores*, Budget& b) override {
    const HeadSet named = heads_of_class(params.classes, c.layer());
    const HeadScores echo = head_scores(c, "echo"), induction = head_scores(c, "induction");
    const double echo_share = params.echo, induction_share = params.induction;
    const i32 layer = c.layer().index, heads_kv = c.layer().num_kv_heads;
    const i32 sinks = params.sinks, recent = params.capacity - params.sinks;  // the oldest one becomes the mean
    const Rows rows = b.rows;
    i32 *rule = b.rule, *window_sinks = b.window_sinks, *window_recent = b.window_recent;
    const auto among = [=] LACUNA_HD(const HeadScores& of, i64 head, double share) {
      return of.of_layer[layer] &&
             static_cast<double>(of.rank(layer, head)) < rint(share * static_cast<double>(of.known()));
    };
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 head = rows.kv_row(row, heads_kv) % heads_kv;
      const bool retrieval =
          named.contains(head) || among(echo, head, echo_share) || among(induction, head, induction_share);
      rule[row] = static_cast<i32>(retrieval ? Rule::full : Rule::window);
      window_sinks[row] = sinks;
      window_recent[row] = recent;
    });
  }

  void rewrite(Context& c, const Rewrite& r) override {
    if (!c.prefill()) return;  // the mean stands for what the prompt dropped
    const Rewrite of = r;
    const i64 d = r.head_dim, sinks = params.sinks;
    c.for_each(r.rows * d, [=] LACUNA_HD(i64 i) {
      const i64 row = i / d, e = i % d;
      if (of.kept_count[row] <= sinks) return;
      const i64 oldest = of.kept[row * of.slots + sinks], n = oldest - sinks + 1;  // the dropped ones end before it
      for (float* x : {of.k, of.v}) {
        double sum = 0;
        for (i64 slot = sinks; slot <= oldest; ++slot) sum += static_cast<double>(x[(row * of.slots + slot) * d + e]);
        x[(row * of.slots + oldest) * d + e] = static_cast<float>(sum / static_cast<double>(n));
      }
    });
    const double read = 2.0 * static_cast<double>(r.rows * d) * static_cast<double>(r.slots);
    c.charge(4.0 * read, read);
  }

  void calibrate(Context& c, Calibration& to) override {
    const Paged kv = c.kv();
    const Queries q = c.seen_queries();
    const i64 period = params.period, n = q.count, d = q.head_dim, group = c.layer().group(), heads = q.heads;
    const double scale = c.layer().softmax_scale;
    double *echo = to.sums("echo", heads), *induction = to.sums("induction", heads), *pairs = to.sums("pairs", 1);
    std::vector<double> of_query(static_cast<std::size_t>(2 * heads * n));
    double* found = of_query.data();  // of a query: attention on copies, and on the tokens after them
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      const i64 head = i / n, at = i % n;
      double peak = -INFINITY, total = 0, on_copies = 0, after = 0;
      for (i64 j = 0; j <= at; ++j) {
        double logit = 0;
        for (i64 e = 0; e < d; ++e)
          logit += static_cast<double>(q.at(0, head, at, e)) * static_cast<double>(kv.key(head / group, j, e));
        logit *= scale;
        if (logit > peak) {
          const double shrink = exp(peak - logit);
          total *= shrink;
          on_copies *= shrink;
          after *= shrink;
          peak = logit;
        }
        const double p = exp(logit - peak);
        total += p;
        if (j >= 1 && j < at && (at - j) % period == 0) on_copies += p;
        if (j >= 2 && (at - j + 1) % period == 0) after += p;
      }
      found[2 * i] = on_copies / total;
      found[2 * i + 1] = after / total;
    });
    for (i64 i = 0; i < heads * n; ++i) {
      echo[i / n] += found[2 * i];
      induction[i / n] += found[2 * i + 1];
    }
    for (i64 at = 1; at < n; ++at) pairs[0] += static_cast<double>((at - 1) / period);
    if (pairs[0] == 0)
      throw Failure("no token of the trace repeats after " + std::to_string(period) +
                    ": set period to that of the trace");
    if (!to.last()) return;
    put_largest(to, "echo", echo, heads / group, group, pairs[0]);
    put_largest(to, "induction", induction, heads / group, group, pairs[0]);
  }

  static void put_largest(Calibration& to, const char* name, const double* sums, i64 heads, i64 group, double pairs) {
    std::vector<float> out;
    for (i64 h = 0; h < heads; ++h)
      out.push_back(static_cast<float>(*std::max_element(sums + h * group, sums + (h + 1) * group) / pairs));
    const i64 extent[1] = {heads};
    to.put(name, out.data(), 1, extent);
  }
};
}  // namespace

LACUNA_PLUGIN(Razor)
