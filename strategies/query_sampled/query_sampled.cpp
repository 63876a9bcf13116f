// Query-sampled columns: tokens ranked by the attention that a sample of the prompt's queries pays them. No original.
//
//   sample = every stride-th query, counted back from the prompt's last one
//   score(token) = mean over the sample of its causal softmax probability (0 where a query comes before the token)
//   every tile of queries reads its best visible tokens, the last `recent` ones (64) before each query first; the
//   scores are those of the whole prompt, the same for all tiles of a head. The estimate costs 2 / stride of the
//   logits.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

/// The sampled queries of a prompt and what they attend to.
struct Sample {
  Queries q;
  Paged kv;
  i64 stride, count;
  float scale;

  LACUNA_HD i64 query(i64 n) const { return q.count - 1 - n * stride; }
  LACUNA_HD i64 visible(i64 n) const { return q.first_position + query(n) + 1; }
  LACUNA_HD float logit(i64 head, i64 n, i64 slot) const {
    const i64 seq = head / q.heads, h = head % q.heads, kv_heads = kv.rows / q.seqs;
    const i64 key = kv.physical(seq * kv_heads + h / (q.heads / kv_heads), slot) * kv.head_dim;
    const i64 query_at = seq * q.seq_stride + h * q.head_stride + query(n) * q.row_stride;
    float sum = 0.f;
    for (i64 e = 0; e < kv.head_dim; ++e) sum += load(q.data, q.dtype, query_at + e) * load(kv.k, kv.dtype, key + e);
    return sum * scale;
  }
};

struct QuerySampled : Strategy {
  struct Params {
    i32 stride = 16;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("stride", &Params::stride, "one query in so many is sampled", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "query_sampled";
    i.summary = "tokens with the most attention from a sample of the queries, and a local window";
    i.paper = "-";
    i.rule = "score(token) = mean probability that every stride-th query gives it; the last `recent` tokens forced";
    i.phases = kPrefill;
    i.defaults = R"({"recent": 64})";
    i.dense_point = R"({"density": 1.0})";
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::mass;
    p.num_states = 1;
    p.states[0] = {"columns", Dtype::f32, c.layer().num_qo_heads * p.max_cached};
    const i64 samples = (p.max_cached + params.stride - 1) / params.stride;
    p.workspace_bytes = c.call().num_seqs * c.layer().num_qo_heads * samples * 4 + 256;
  }

  void score(Context& c, Scores& s) override {
    const Rows rows = s.rows;
    const i64 units = s.units, stride = s.stride;
    float* column = c.state<float>("columns");
    if (rows.tile_begin == 0) rank_columns(c, column, units);  // later ranges of tiles read the same
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units;
      if (unit < rows.first_position + rows.query_end(row))
        value[row * stride + unit] = column[row / rows.tiles * units + unit];
    });
    c.charge(4. * static_cast<double>(rows.count() * units), 0.);
  }

  /// column [heads, units]
  void rank_columns(Context& c, float* column, i64 units) {
    const Queries q = c.current_queries();
    const Sample sample{q, c.kv(), params.stride, (q.count - 1) / params.stride + 1, c.layer().softmax_scale};
    const i64 heads = static_cast<i64>(q.seqs) * q.heads, count = sample.count;
    float* lse = c.workspace<float>(heads * count);
    c.for_each(heads * count, [=] LACUNA_HD(i64 i) {
      float top = -INFINITY;
      double sum = 0;
      for (i64 slot = 0; slot < sample.visible(i % count); ++slot) {
        const float x = sample.logit(i / count, i % count, slot);
        if (x > top) {
          sum *= static_cast<double>(expf(top - x));
          top = x;
        }
        sum += static_cast<double>(expf(x - top));
      }
      lse[i] = top + static_cast<float>(log(sum));
    });
    c.for_each(heads * units, [=] LACUNA_HD(i64 i) {
      double sum = 0;
      for (i64 n = 0; n < count && sample.visible(n) > i % units; ++n)
        sum += static_cast<double>(expf(sample.logit(i / units, n, i % units) - lse[i / units * count + n]));
      column[i] = static_cast<float>(sum / static_cast<double>(count));
    });
    const double pairs = .5 * static_cast<double>(heads * count) * static_cast<double>(units);
    const double d = q.head_dim;
    c.charge(2. * static_cast<double>(size_of(sample.kv.dtype) * sample.kv.rows * units + 4 * heads * count) * d,
             (4. * d + 8.) * pairs);
  }
};
}  // namespace

LACUNA_PLUGIN(QuerySampled)
