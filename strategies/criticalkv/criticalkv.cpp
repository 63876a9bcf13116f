// CriticalKV (Feng et al. 2025, "Identify critical KV cache in LLM inference from an output perturbation perspective",
// arXiv 2502.03805)
//
//   s(j)    = the base's score of token j; one that the base forces: the layer's largest finite score + 1
//   stage 1 : the floor(first_stage * budget) best by s, the base's forced tokens before all others
//   nu(j)   = mean over the G query heads of || v_j W_O[h] ||_1 (over the model's width, no bias)
//   stage 2 : the rest ranks by (s(j) + epsilon) * nu(j), until the budget is full
//
// As kvpress' CriticalKVPress: a token that the base forces and stage 1 does not reach competes in stage 2. Beside an
// allocator stage 1 is a share of the mean budget. It evicts when the base does.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct CriticalKv : Strategy {
  static constexpr i64 kPart = 256;  // scores that one thread compares

  struct Params {
    Base base{R"({"name": "snapkv"})"};
    double first_stage = .5, epsilon = 1e-4;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy whose scores are weighted")
        .field("first_stage", &Params::first_stage, "share of the budget that the base's scores alone fill", "0..1")
        .field("epsilon", &Params::epsilon, "added to the base's score before it is weighted", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "criticalkv";
    i.summary = "another strategy's scores weighted by what a value does to the layer's output";
    i.paper = "Feng et al. 2025, arXiv 2502.03805";
    i.rule = "half of the budget by s; the rest by (s + epsilon) * mean over the group of |v W_O|_1";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.wrapper = 1;
    i.needs = kNeedsProjection;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.score_kind = ScoreKind::logit;
    const Layer& l = c.layer();
    const i64 kv_rows = static_cast<i64>(c.call().num_seqs) * l.num_kv_heads;
    const i64 parts = (p.max_cached + kPart - 1) / kPart;
    p.workspace_bytes = kv_rows * p.max_cached * (8 * l.group() + 4) + kv_rows * (parts * 4 + 8) + 4 + 6 * 256;
  }

  void score(Context& c, Scores& s) override {
    if (s.budget_tokens < 0) throw Failure("criticalkv has no size of its own: give it a budget");
    const Paged kv = c.kv();
    const i64 count = s.rows.count(), stride = s.stride, slots = kv.max_length, group = c.layer().group();
    c.base_scores(s);
    i32 *stage = c.workspace<i32>(count), *size = c.workspace<i32>(count), *best = c.workspace<i32>(count * slots);
    const i32 in_stage = static_cast<i32>(params.first_stage * static_cast<double>(s.budget_tokens) + 1e-9);
    c.for_each(count, [=] LACUNA_HD(i64 row) { stage[row] = in_stage; });
    c.topk(s.value, static_cast<i32>(count), stride, kv.length, stage, best, size, slots);

    const float* largest = largest_finite(c, s);
    const double* norm = projected_norms(c);
    const double epsilon = params.epsilon;
    const float first = INFINITY;
    float* value = s.value;
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots;
      float& score = value[row * stride + slot];
      if (slot >= kv.length[row] || score == -first) return;
      double nu = 0;
      for (i64 g = 0; g < group; ++g) nu += norm[(row * group + g) * slots + slot];
      const double finite = score == first ? static_cast<double>(*largest) + 1 : static_cast<double>(score);
      score = static_cast<float>((finite + epsilon) * (nu / static_cast<double>(group)));
    });
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots;
      if (i % slots < size[row]) value[row * stride + best[i]] = first;
    });
    c.charge(20.0 * count * slots, 4.0 * count * slots);
  }

  /// One number: the largest finite score of the layer, 0 if there is none.
  float* largest_finite(Context& c, const Scores& s) {
    const Paged kv = c.kv();
    const i64 count = s.rows.count(), stride = s.stride, slots = kv.max_length, parts = (slots + kPart - 1) / kPart;
    const float* value = s.value;
    float *partial = c.workspace<float>(count * parts), *out = c.workspace<float>(1);
    const float none = -INFINITY;
    c.for_each(count * parts, [=] LACUNA_HD(i64 i) {
      const i64 row = i / parts, begin = i % parts * kPart;
      float most = none;
      for (i64 slot = begin; slot < begin + kPart && slot < kv.length[row]; ++slot) {
        const float v = value[row * stride + slot];
        if (v < -none && v > most) most = v;
      }
      partial[i] = most;
    });
    c.for_each(1, [=] LACUNA_HD(i64) {
      float most = none;
      for (i64 i = 0; i < count * parts; ++i) most = partial[i] > most ? partial[i] : most;
      *out = most == none ? 0.f : most;
    });
    return out;
  }

  /// || v W_O[h] ||_1: [kv.rows, G, slots].
  double* projected_norms(Context& c) {
    const Array wo = c.output_projection();
    if (!wo.data) throw Failure("criticalkv needs W_O, which the trace has not");
    const Paged kv = c.kv();
    const i64 slots = kv.max_length, group = c.layer().group(), d = kv.head_dim, kv_heads = c.layer().num_kv_heads;
    const i64 width = wo.extent[0], n = kv.rows * group * slots;
    double* norm = c.workspace<double>(n);
    c.for_each(n, [=] LACUNA_HD(i64 i) {
      constexpr i64 kOutputs = 8;  // at a time, for one read of the value
      const i64 slot = i % slots, g = i / slots % group, row = i / slots / group;
      if (slot >= kv.length[row]) return;
      const i64 column = (row % kv_heads * group + g) * d;
      double sum = 0;
      for (i64 m = 0; m < width; m += kOutputs) {
        double out[kOutputs] = {};
        for (i64 e = 0; e < d; ++e) {
          const double v = kv.value(row, slot, e);
          for (i64 o = 0; o < kOutputs && m + o < width; ++o)
            out[o] += v * load(wo.data, wo.dtype, (m + o) * wo.stride[0] + column + e);
        }
        for (i64 o = 0; o < kOutputs; ++o) sum += fabs(out[o]);
      }
      norm[i] = sum;
    });
    const double projected = static_cast<double>(n) * static_cast<double>(d);
    c.charge(
        projected / group * size_of(kv.dtype) + static_cast<double>(width) * kv_heads * group * d * size_of(wo.dtype),
        2.0 * projected * static_cast<double>(width));
    return norm;
  }
};
}  // namespace

LACUNA_PLUGIN(CriticalKv)
