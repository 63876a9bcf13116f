// CUR (after Sengupta et al. 2025, "Value-guided KV compression for LLMs via approximated CUR decomposition",
// arXiv 2509.15038), as kvpress states it: products of squared norms, no decomposition
//
//   a_j      = |k_j|^2 / its sum over the window of `window` tokens that holds j,  b_j likewise of v
//   score(j) = a_j b_j / sum over all tokens of a b
//   the sinks are kept; no recent tokens.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/reductions.hpp>

namespace {
using namespace lacuna::sdk;

struct Values {
  const double* value;
  i64 n;

  LACUNA_HD double operator()(i64 row, i64 slot, i64) const { return value[row * n + slot]; }
};

struct Cur : Strategy {
  struct Params {
    i32 window = 16;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("window", &Params::window, "tokens whose norms are compared; windows do not overlap", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "cur";
    i.summary = "tokens ranked by the norms of key and value against those of their neighbours";
    i.paper = "Sengupta et al. 2025, arXiv 2509.15038";
    i.rule = "score(j) = (|k_j|^2 / sum over its window) (|v_j|^2 / sum over its window), sinks kept";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean", "sinks": 4})";
    i.presets = R"({"kvpress": {}})";
    i.dense_point = R"({"density": 1.0})";
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    p.workspace_bytes = 3 * (rows * p.max_cached * 8 + 256) + row_sums_bytes(rows, p.max_cached, 1);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride, d = kv.head_dim, window = params.window;
    double* key = c.workspace<double>(rows * n);  // squared norms, 0 past the row's end
    double* val = c.workspace<double>(rows * n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot >= kv.length[row]) return;
      const i64 at = kv.physical(row, slot) * d;
      for (i64 e = 0; e < d; ++e) {
        const double k = load(kv.k, kv.dtype, at + e), v = load(kv.v, kv.dtype, at + e);
        key[i] += k * k;
        val[i] += v * v;
      }
    });
    double* product = c.workspace<double>(rows * n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 begin = i / n * n + i % n / window * window;
      const i64 row_end = (i / n + 1) * n, end = begin + window < row_end ? begin + window : row_end;
      double keys = 0, values = 0;
      for (i64 j = begin; j < end; ++j) {
        keys += key[j];
        values += val[j];
      }
      product[i] = keys > 0 && values > 0 ? key[i] / keys * (val[i] / values) : 0.0;
    });
    const double* total = row_sums(c, rows, n, 1, Values{product, n});
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;
      if (slot >= kv.length[row]) return;
      value[row * stride + slot] = total[row] > 0 ? static_cast<float>(product[i] / total[row]) : 0.f;
    });
    const double elements = 2.0 * rows * n * d;
    c.charge(elements * size_of(kv.dtype) + 36.0 * rows * n, 2.0 * elements + 2.0 * window * rows * n);
  }
};
}  // namespace

LACUNA_PLUGIN(Cur)
