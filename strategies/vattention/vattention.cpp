// vAttention (Desai et al. 2025, "vAttention: verified sparse attention", arXiv 2510.05688)
//
//   exact: the first `sinks` and the last `recent` tokens, and of the R tokens between them the floor(top_fraction * S)
//   with the largest q . k
//   sigma, D: b = max(2, floor(sample_rate * R)) uniform draws with replacement out of the R estimate the deviation of
//   e = exp(logit - row maximum), and D = sum of e over the exact tokens + R / b * sum of e over the draws
//   n = floor((z * sigma * R / (epsilon * D))^2), within [b, R], z the one-sided (1 - delta) quantile of the normal
//   law, so that the denominator is off by more than epsilon with probability delta
//   sampled: n fresh draws with replacement out of the R; a token drawn that is not exact weighs R / n, once
//
// The top tokens are not taken out of the R, and a token drawn twice counts once, as in the original.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i64 kParts = 128;    // of a row's sums
constexpr i64 kSegment = 512;  // slots whose marks are one thread's

/// z with P(standard normal <= z) = p, by bisection.
double normal_quantile(double p) {
  double lo = -40, hi = 40;
  for (int i = 0; i < 200; ++i) {
    const double z = (lo + hi) / 2;
    (0.5 * std::erfc(-z / std::sqrt(2.0)) < p ? lo : hi) = z;
  }
  return lo;
}

/// The arrays of one call; a row is a query head.
struct Rowwise {
  i32 *length, *range, *wanted, *top, *count;  // [rows] cached, R, top tokens that are wanted and there, draws
  i32 *one, *best, *found;                     // [rows] where the maximum is
  float *logit, *mark;                         // [rows, slots]
  i32 *listed, *drawn;                         // [rows, slots] top tokens less the sinks, slots of the draws
  double* sums;                                // [rows, kParts, 3] of e: exact, draws, draws squared
};

/// A draw out of [0, range).
LACUNA_HD i64 draw(const Random& random, i64 row, i64 counter, i64 range) {
  const u64 bits = random.bits(static_cast<u64>(row), static_cast<u64>(counter)) >> 32;
  return static_cast<i64>(bits * static_cast<u64>(range) >> 32);
}

struct VAttention : Strategy {
  struct Params {
    double epsilon = 0.1, delta = 0.1;
    double top_fraction = 0.05, sample_rate = 0.05;
  } params;

  static void schema(Schema<Params>& s) {
    s.knob("epsilon", &Params::epsilon, "relative error of the denominator that is allowed", "0<..")
        .field("delta", &Params::delta, "probability that it is larger", "0<..<0.5")
        .field("top_fraction", &Params::top_fraction, "share of the cached tokens that are the largest logits", "0..1")
        .field("sample_rate", &Params::sample_rate, "share of the rest that is drawn at least", "0..1");
  }
  static Info info() {
    Info i{};
    i.name = "vattention";
    i.summary = "top tokens exactly, the rest sampled until the softmax denominator is within epsilon";
    i.paper = "Desai et al. 2025, arXiv 2510.05688";
    i.rule =
        "sinks, window and top-k exact; n = (z sigma R / (epsilon D))^2 uniform draws of the other R tokens, logit + "
        "log(R / n)";
    i.phases = kDecode;
    i.defaults = R"({"sinks": 128, "recent": 128})";
    i.dense_point = R"({"top_fraction": 1.0})";
    i.stochastic = 1;
    i.takes_budget = 0;
    i.cost = "d_h S H_kv elements read, 2 d_h S H FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.max_pieces = 0;
    p.weighted = 1;
    p.workspace_bytes = rows * (16 * p.max_cached + 24 * kParts + 32) + 12 * 256;
  }

  void mark(Context& c, const Budget&, Selection& s) override {
    const Selection out = s;
    const Rows rows = s.rows;
    const i64 count = rows.count(), slots = c.kv().max_length;
    const Rowwise of = logits(c, rows);
    find_top(c, of, count);
    size_sample(c, of, count);
    mark_slots(c, of, count);
    c.for_each(count, [=] LACUNA_HD(i64 row) { out.full[row] = of.range[row] < 2; });
    c.topk(of.mark, static_cast<i32>(count), slots, of.length, of.length, out.tokens, out.token_count,
           out.token_capacity);
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, at = row * out.token_capacity + i % slots;
      if (i % slots >= out.token_count[row] || of.mark[row * slots + out.tokens[at]] > 1.f) return;
      out.token_log_weight[at] =
          static_cast<float>(log(static_cast<double>(of.range[row]) / static_cast<double>(of.count[row])));
    });
  }

  /// Every logit, and the rows' sizes.
  Rowwise logits(Context& c, const Rows& rows) const {
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const i64 count = rows.count(), slots = kv.max_length, d = q.head_dim, ends = i64{common.sinks} + common.recent;
    const i32 kv_heads = c.layer().num_kv_heads;
    const float scale = c.layer().softmax_scale;
    const double top_fraction = params.top_fraction;
    const Rowwise of{c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<i32>(count),
                     c.workspace<float>(count * slots),
                     c.workspace<float>(count * slots),
                     c.workspace<i32>(count * slots),
                     c.workspace<i32>(count * slots),
                     c.workspace<double>(count * kParts * 3)};
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 length = kv.length[rows.kv_row(row, kv_heads)], range = length - ends;
      of.length[row] = static_cast<i32>(length);
      of.range[row] = static_cast<i32>(range > 0 ? range : 0);
      of.one[row] = 1;
      of.wanted[row] = static_cast<i32>(floor(top_fraction * static_cast<double>(length) + 1e-9));
    });
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots, kv_row = rows.kv_row(row, kv_heads);
      if (slot >= of.length[row]) return;
      const i64 at = kv.physical(kv_row, slot) * d;
      double sum = 0;
      for (i64 e = 0; e < d; ++e)
        sum += static_cast<double>(q.at(rows.seq_of(row), rows.head_of(row), 0, e)) * load(kv.k, kv.dtype, at + e);
      of.logit[i] = static_cast<float>(sum * scale);
    });
    const double scored = static_cast<double>(slots) * static_cast<double>(d);
    c.charge(size_of(kv.dtype) * scored * static_cast<double>(kv.rows), 2.0 * scored * static_cast<double>(count));
    return of;
  }

  /// The row's maximum, and the top tokens of the range.
  void find_top(Context& c, const Rowwise& of, i64 rows) const {
    const i64 slots = c.kv().max_length, first = common.sinks < slots ? common.sinks : slots;
    c.topk(of.logit + first, static_cast<i32>(rows), slots, of.range, of.wanted, of.listed, of.top, slots);
    c.topk(of.logit, static_cast<i32>(rows), slots, of.length, of.one, of.best, of.found, 1);
  }

  /// The number of draws that the bound asks for.
  void size_sample(Context& c, const Rowwise& of, i64 rows) const {
    const Random random = c.random();
    const i64 slots = c.kv().max_length, sinks = common.sinks, recent = common.recent;
    const double sample_rate = params.sample_rate, reach = normal_quantile(1.0 - params.delta) / params.epsilon;
    c.for_each(rows * kParts, [=] LACUNA_HD(i64 i) {
      const i64 row = i / kParts, length = of.length[row], range = of.range[row];
      if (range < 2) return;
      const float* logit = of.logit + row * slots;
      const double peak = logit[of.best[row]];
      double exact = 0, sum = 0, squares = 0;
      for (i64 j = i % kParts; j < sinks; j += kParts) exact += exp(logit[j] - peak);
      for (i64 j = length - recent + i % kParts; j < length; j += kParts) exact += exp(logit[j] - peak);
      for (i64 j = i % kParts; j < of.top[row]; j += kParts)
        exact += exp(logit[sinks + of.listed[row * slots + j]] - peak);
      const i64 draws = base_draws(sample_rate, range);
      for (i64 j = i % kParts; j < draws; j += kParts) {
        const double e = exp(logit[sinks + draw(random, row, 2 * j, range)] - peak);
        sum += e;
        squares += e * e;
      }
      of.sums[3 * i] = exact, of.sums[3 * i + 1] = sum, of.sums[3 * i + 2] = squares;
    });
    c.for_each(rows, [=] LACUNA_HD(i64 row) {
      const i64 range = of.range[row];
      double exact = 0, sum = 0, squares = 0;
      for (const double* s = of.sums + row * kParts * 3; s < of.sums + (row + 1) * kParts * 3; s += 3)
        exact += s[0], sum += s[1], squares += s[2];
      const double draws = static_cast<double>(base_draws(sample_rate, range)), all = static_cast<double>(range);
      const double variance = fmax(0.0, (squares - sum * sum / draws) / (draws - 1.0));
      const double bound = reach * sqrt(variance) * all / (exact + all / draws * sum);
      of.count[row] = range < 2 ? 0 : static_cast<i32>(fmin(all, fmax(draws, floor(bound * bound))));
    });
  }

  LACUNA_HD static i64 base_draws(double sample_rate, i64 range) {
    const i64 share = static_cast<i64>(floor(sample_rate * static_cast<double>(range) + 1e-9));
    return share > 2 ? share : 2;
  }

  /// mark: 2 for a top token, 1 for one that was drawn, -inf for the others.
  void mark_slots(Context& c, const Rowwise& of, i64 rows) const {
    const Random random = c.random();
    const i64 slots = c.kv().max_length, sinks = common.sinks, segments = (slots + kSegment - 1) / kSegment;
    c.for_each(rows * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, j = i % slots;
      if (j < of.count[row]) of.drawn[i] = static_cast<i32>(sinks + draw(random, row, 2 * j + 1, of.range[row]));
      of.mark[i] = -INFINITY;
    });
    c.for_each(rows * segments, [=] LACUNA_HD(i64 i) {
      const i64 row = i / segments, begin = i % segments * kSegment, end = begin + kSegment;
      for (i64 j = 0; j < of.count[row]; ++j)
        if (const i64 slot = of.drawn[row * slots + j]; slot >= begin && slot < end) of.mark[row * slots + slot] = 1.f;
      for (i64 j = 0; j < of.top[row]; ++j)
        if (const i64 slot = sinks + of.listed[row * slots + j]; slot >= begin && slot < end)
          of.mark[row * slots + slot] = 2.f;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(VAttention)
