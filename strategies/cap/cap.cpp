// CAP (kvpress' CapPress): leverage of the values, weighted by how well their keys point along the expected query
//
//   m'       = mean of the prompt's queries before RoPE, the first `sinks` left out, under the mean rotation of the
//              `future` positions after the prompt, per query head
//   u(j)     = exp(sharpness cos(m', k_j) - its maximum over the tokens after the sinks)    (keys after RoPE)
//   A        = I + sum over these tokens of (u(j) + 1e-6) v_j v_j^T
//   score(j) = u(j) v_j^T A^-1 v_j, reduced over the GQA group
//   the sinks are kept; no recent tokens.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/future_query.hpp>
#include <lacuna/sdk/gqa.hpp>
#include <lacuna/sdk/linear.hpp>

namespace {
using namespace lacuna::sdk;

/// sharpness cos(m', k) of the slots that count.
struct Alignment {
  const double* value;
  i64 n, group;
  Inner inner;
  const i32* length;

  LACUNA_HD double operator()(i64 head, i64 slot) const {
    return inner.holds(slot, length[head / group]) ? value[head * n + slot] : -INFINITY;
  }
};

/// Values times the root of their weight.
struct WeightedValues {
  const void* v;
  Dtype dtype;
  i64 n, group;
  const i64* place;    // [kv rows, n] first element of a slot's value
  const double* root;  // [heads, n], 0 where a slot does not count

  LACUNA_HD double operator()(i64 head, i64 slot, i64 e) const {
    const double r = root[head * n + slot];
    return r > 0 ? r * load(v, dtype, place[head / group * n + slot] + e) : 0.0;
  }
};

/// Leverage of one slot's value under each head's weights.
struct Leverage {
  const double *weight, *inverted;  // [heads, n], [heads, d, d]
  i64 n, d, slot;
  CachedVector v;

  LACUNA_HD double operator()(i64 head) const {
    return weight[head * n + slot] * quadratic_form(inverted + head * d * d, d, v);
  }
};

struct Cap : Strategy {
  struct Params {
    i32 future = 512;
    double sharpness = 5;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("future", &Params::future, "positions after the prompt that are expected to ask", "1..1048576")
        .field("sharpness", &Params::sharpness, "factor of the cosine in the exponent", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "cap";
    i.summary = "tokens ranked by value leverage under weights from the expected query";
    i.paper = "kvpress, CapPress (github.com/NVIDIA/kvpress)";
    i.rule = "score(j) = u_j v_j^T (I + sum u v v^T)^-1 v_j, u = exp(5 cos(mean future query, k)); sinks kept";
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
                        3 * (heads * n * 8 + 256) + row_max_bytes(heads, n);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 n = kv.max_length, stride = s.stride, d = kv.head_dim, group = c.layer().group();
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    const Inner inner{common.sinks, 0};
    const double* weight = weights(c, inner, heads);
    double* root = c.workspace<double>(heads * n);
    i64* place = c.workspace<i64>(kv.rows * n);
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      const i64 head = i / n, slot = i % n, kv_row = head / group;
      if (!inner.holds(slot, kv.length[kv_row])) return;
      root[i] = sqrt(weight[i] + 1e-6);
      if (head % group == 0) place[kv_row * n + slot] = kv.physical(kv_row, slot) * d;
    });
    const WeightedValues values{kv.v, kv.dtype, n, group, place, root};
    const double* inverted = inverse(c, heads, d, gram(c, heads, n, d, 1.0, values));
    const Gqa gqa = common.gqa;
    float* value = s.value;
    c.for_each(rows.count() * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv);
      if (!inner.holds(slot, kv.length[kv_row])) return;
      const Leverage leverage{weight, inverted, n, d, slot, {kv.v, kv.dtype, place[kv_row * n + slot]}};
      value[row * stride + slot] = static_cast<float>(reduce_heads(rows, row, group, gqa, leverage));
    });
    c.charge(1.0 * kv.rows * n * d * size_of(kv.dtype) + 4.0 * rows.count() * n, 1.0 * heads * n * d * d);
  }

  /// u [heads, n]; 0 outside the inner slots.
  double* weights(Context& c, Inner inner, i64 heads) const {
    const Paged kv = c.kv();
    const i64 n = kv.max_length, d = kv.head_dim, group = c.layer().group();
    const double* mean = future_query(c, inner.first, params.future).mean;
    const double sharpness = params.sharpness;
    double* u = c.workspace<double>(heads * n);
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      const i64 head = i / n, slot = i % n, kv_row = head / group;
      if (!inner.holds(slot, kv.length[kv_row])) return;
      const i64 at = kv.physical(kv_row, slot) * d;
      double dot = 0, keys = 0, queries = 0;
      for (i64 e = 0; e < d; ++e) {
        const double k = load(kv.k, kv.dtype, at + e), m = mean[head * d + e];
        dot += m * k;
        keys += k * k;
        queries += m * m;
      }
      u[i] = keys > 0 && queries > 0 ? sharpness * dot / sqrt(keys * queries) : 0.0;
    });
    const double* largest = row_max(c, heads, n, Alignment{u, n, group, inner, kv.length});
    c.for_each(heads * n, [=] LACUNA_HD(i64 i) {
      if (inner.holds(i % n, kv.length[i / n / group])) u[i] = exp(u[i] - largest[i / n]);
    });
    c.charge(1.0 * kv.rows * n * d * size_of(kv.dtype) + 24.0 * heads * n, 6.0 * heads * n * d);
    return u;
  }
};
}  // namespace

LACUNA_PLUGIN(Cap)
