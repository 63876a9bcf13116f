// Expected attention (Devoto et al. 2025, "Expected Attention: KV cache compression by estimating attention from future
// queries distribution", arXiv 2510.00636), as kvpress states it
//
//   m, S     = mean and covariance of the prompt's queries before RoPE, the first `sinks` left out, per query head
//   R        = mean rotation of the `future` positions after the prompt;  m' = R m, S' = R S R^T
//   l(j)     = scale m' . k_j + scale^2 k_j^T S' k_j / 2                  (keys after RoPE; `covariance` off: no S)
//   p        = softmax of l over the tokens after the sinks, reduced over the GQA group
//   score(j) = (p(j) + epsilon) |v_j|                                     (`value_norm` off: p(j))
//   the sinks are kept; no recent tokens.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/future_query.hpp>
#include <lacuna/sdk/gqa.hpp>
#include <lacuna/sdk/linear.hpp>

namespace {
using namespace lacuna::sdk;

/// Probabilities [heads, n] of one slot.
struct Expected {
  const double* p;
  i64 n, slot;

  LACUNA_HD double operator()(i64 head) const { return p[head * n + slot]; }
};

/// Logits [heads, n] of the slots that count, and what the softmax adds up: exp(logit - largest).
struct Logits {
  const double* value;
  i64 n, group;
  Inner inner;
  const i32* length;
  const double* largest;

  LACUNA_HD double operator()(i64 head, i64 slot) const {
    return inner.holds(slot, length[head / group]) ? value[head * n + slot] : -INFINITY;
  }
  LACUNA_HD double operator()(i64 head, i64 slot, i64) const {
    return inner.holds(slot, length[head / group]) ? exp(value[head * n + slot] - largest[head]) : 0.0;
  }
};

struct ExpectedAttention : Strategy {
  struct Params {
    i32 future = 512;
    bool covariance = true, value_norm = true;
    double epsilon = 0;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("future", &Params::future, "positions after the prompt that are expected to ask", "1..1048576")
        .field("covariance", &Params::covariance, "the queries' covariance counts beside their mean")
        .field("value_norm", &Params::value_norm, "probabilities times the value's norm")
        .field("epsilon", &Params::epsilon, "added to probabilities before the value's norm", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "expected_attention";
    i.summary = "tokens ranked by the attention that a normal model of the prompt's queries expects";
    i.paper = "Devoto et al. 2025, arXiv 2510.00636";
    i.rule = "score(j) = softmax(m'.k/sqrt(d) + k^T S' k/2d)(j) |v_j|, m', S' of future queries; sinks kept";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean", "sinks": 4})";
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
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads, n = p.max_cached;
    const i64 d = c.layer().head_dim;
    p.workspace_bytes = future_query_bytes(heads, n, d, params.future) + 2 * matrix_bytes(heads, d) +
                        2 * (heads * n * 8 + 256) + row_max_bytes(heads, n) + row_sums_bytes(heads, n, 1);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 n = kv.max_length, stride = s.stride, d = kv.head_dim, group = c.layer().group();
    const Inner inner{common.sinks, 0};
    const double* p = probabilities(c, inner);
    const Gqa gqa = common.gqa;
    const bool norms = params.value_norm;
    const double epsilon = params.epsilon;
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv);
      if (!inner.holds(slot, kv.length[kv_row])) return;
      double reduced = reduce_heads(rows, row, group, gqa, Expected{p, n, slot});
      if (norms) {
        double square = 0;
        const i64 at = kv.physical(kv_row, slot) * d;
        for (i64 e = 0; e < d; ++e) {
          const double v = load(kv.v, kv.dtype, at + e);
          square += v * v;
        }
        reduced = (reduced + epsilon) * sqrt(square);
      }
      value[row * stride + slot] = static_cast<float>(reduced);
    });
    c.charge(8.0 * c.layer().num_qo_heads * n + rows.count() * n * (4.0 + (norms ? 1.0 * d * size_of(kv.dtype) : 0.0)),
             rows.count() * n * (norms ? 2.0 * d : 0.0));
  }

  /// Expected attention [heads, n] of every query head to the inner slots.
  const double* probabilities(Context& c, Inner inner) const {
    const Paged kv = c.kv();
    const i64 n = kv.max_length, d = kv.head_dim, group = c.layer().group();
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    const FutureQuery future = future_query(c, inner.first, params.future);
    const double* covariance = params.covariance ? rotated_covariance(c, future, heads) : nullptr;
    const double* mean = future.mean;
    const double scale = c.layer().softmax_scale;
    double* logit = c.workspace<double>(heads * n);
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      const i64 head = i / n, slot = i % n, kv_row = head / group;
      if (!inner.holds(slot, kv.length[kv_row])) return;
      const CachedVector k{kv.k, kv.dtype, kv.physical(kv_row, slot) * d};
      double dot = 0;
      for (i64 e = 0; e < d; ++e) dot += mean[head * d + e] * k(e);
      const double spread = covariance ? quadratic_form(covariance + head * d * d, d, k) : 0.0;
      logit[i] = scale * dot + .5 * scale * scale * spread;
    });
    c.charge(1.0 * kv.rows * n * d * size_of(kv.dtype) + 8.0 * heads * n,
             heads * n * (2.0 * d + (covariance ? 1.0 * d * d : 0.0)));

    Logits logits{logit, n, group, inner, kv.length, nullptr};
    logits.largest = row_max(c, heads, n, logits);
    const double* sum = row_sums(c, heads, n, 1, logits);
    double* out = c.workspace<double>(heads * n);
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      if (inner.holds(i % n, kv.length[i / n / group])) out[i] = logits(i / n, i % n, 0) / sum[i / n];
    });
    c.charge(16.0 * heads * n, 1.0 * heads * n);
    return out;
  }

  /// R S R^T [heads, d, d].
  static const double* rotated_covariance(Context& c, const FutureQuery& future, i64 heads) {
    const PromptQueries queries = future.queries;
    const MeanRotation r = future.rotation;
    const i64 d = queries.q.head_dim, count = queries.count();
    const double* products = gram(c, heads, queries.q.count, d, 0.0, queries);
    const double share = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
    double* out = c.workspace<double>(heads * d * d);
    c.for_each(heads * d * d, [=] LACUNA_HD(i64 i) {
      const double* m = products + i / (d * d) * d * d;
      const i64 a = i / d % d, b = i % d, other_a = r.partner(a), other_b = r.partner(b);
      const double kept = r.of(b, 0) * m[a * d + b] + r.of(b, 1) * m[a * d + other_b];
      const double turned = r.of(b, 0) * m[other_a * d + b] + r.of(b, 1) * m[other_a * d + other_b];
      out[i] = share * (r.of(a, 0) * kept + r.of(a, 1) * turned);
    });
    c.charge(16.0 * heads * d * d, 6.0 * heads * d * d);
    return out;
  }
};
}  // namespace

LACUNA_PLUGIN(ExpectedAttention)
