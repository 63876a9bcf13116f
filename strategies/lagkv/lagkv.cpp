// LagKV (Liang et al. 2025, "LagKV: lag-relative information of the KV cache tells which tokens are important",
// arXiv 2504.04704), as kvpress states it
//
//   after the sinks, partitions of `lag` tokens; partition p is judged by the one after it:
//     x'_j     = (x_j - min) / (max - min), per channel, min and max over partition p + 1     (x: k, then v)
//     w_x(j)   = softmax over the tokens of p of the standard deviation of x'_j over its channels
//     score(j) = rank of (w_k(j) + w_v(j)) / 2 inside p, ascending, over lag                  (0 .. (lag - 1) / lag)
//   the sinks and what no partition judges (lag to 2 lag - 1 last tokens) score 1.
//   Fewer than two partitions: score(j) = (j - sinks) / (length - sinks).
//
// A channel that is constant in p + 1 counts 0 (kvpress: not a number). Each partition keeps about the same share.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

/// Partitions of one row. `judged`: those with a partition after them.
struct Partitions {
  i64 sinks, lag;

  LACUNA_HD i64 judged(i64 length) const {
    const i64 full = length > sinks ? (length - sinks) / lag : 0;
    return full > 0 ? full - 1 : 0;
  }
  LACUNA_HD i64 begin(i64 p) const { return sinks + p * lag; }
};

struct LagKv : Strategy {
  struct Params {
    i32 lag = 128;
  } params;

  static void schema(Schema<Params>& s) { s.field("lag", &Params::lag, "tokens of a partition", "1.."); }
  static Info info() {
    Info i{};
    i.name = "lagkv";
    i.summary = "tokens ranked inside partitions, by their spread against the next partition's range";
    i.paper = "Liang et al. 2025, arXiv 2504.04704";
    i.rule = "score(j) = rank in its partition of softmax(std of k, v scaled by the next partition's min and max)";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean", "sinks": 4})";
    i.presets = R"({"kvpress": {}})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    const i64 parts = p.max_cached / params.lag + 1;
    p.workspace_bytes = 2 * (rows * parts * c.layer().head_dim * 8 + 256) + 3 * (rows * p.max_cached * 8 + 256) +
                        rows * parts * 32 + 256;
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const Partitions part{common.sinks, params.lag};
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride, sinks = part.sinks, lag = part.lag;
    const i64 parts = n / lag + 1;
    const double* spread_k = spreads(c, kv.k, part, parts);
    const double* spread_v = spreads(c, kv.v, part, parts);
    double* top = c.workspace<double>(rows * parts * 4);  // of k, v: the largest, and the sum of exp(x - largest)
    c.for_each(rows * parts, [=] LACUNA_HD(i64 i) {
      const i64 row = i / parts, p = i % parts;
      if (p >= part.judged(kv.length[row])) return;
      for (i64 x = 0; x < 2; ++x) {
        const double* spread = (x ? spread_v : spread_k) + row * n + part.begin(p);
        double most = spread[0], sum = 0;
        for (i64 j = 1; j < lag; ++j) most = spread[j] > most ? spread[j] : most;
        for (i64 j = 0; j < lag; ++j) sum += exp(spread[j] - most);
        top[i * 4 + x * 2] = most;
        top[i * 4 + x * 2 + 1] = sum;
      }
    });
    double* weight = c.workspace<double>(rows * n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, p = slot < sinks ? parts : (slot - sinks) / lag;
      if (p >= part.judged(kv.length[row])) return;
      const double* t = top + (row * parts + p) * 4;
      weight[i] = exp(spread_k[i] - t[0]) / t[1] + exp(spread_v[i] - t[2]) / t[3];
    });
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, length = kv.length[row], judged = part.judged(length);
      if (slot >= length) return;
      const i64 p = slot < sinks ? parts : (slot - sinks) / lag;
      float score = 1.f;
      if (judged == 0 && slot >= sinks) {
        score = static_cast<float>(static_cast<double>(slot - sinks) / static_cast<double>(length - sinks));
      } else if (p < judged) {
        i64 rank = 0;
        for (i64 j = part.begin(p); j < part.begin(p + 1); ++j) {
          const double other = weight[row * n + j];
          rank += other < weight[i] || (other == weight[i] && j > slot);
        }
        score = static_cast<float>(static_cast<double>(rank) / static_cast<double>(lag));
      }
      value[row * stride + slot] = score;
    });
    c.charge(36.0 * rows * n, 1.0 * lag * rows * n);
  }

  /// Standard deviation over its channels of every judged token's key or value, scaled by the next partition's range.
  static const double* spreads(Context& c, const void* x, Partitions part, i64 parts) {
    const Paged kv = c.kv();
    const i64 rows = kv.rows, n = kv.max_length, d = kv.head_dim, lag = part.lag;
    float* range = c.workspace<float>(rows * parts * d * 2);  // least and largest of partition p + 1
    c.for_each(rows * parts * d, [=] LACUNA_HD(i64 i) {
      const i64 row = i / d / parts, p = i / d % parts, e = i % d;
      if (p >= part.judged(kv.length[row])) return;
      float least = INFINITY, most = -INFINITY;
      for (i64 j = part.begin(p + 1); j < part.begin(p + 2); ++j) {
        const float v = load(x, kv.dtype, kv.physical(row, j) * d + e);
        least = v < least ? v : least;
        most = v > most ? v : most;
      }
      range[i * 2] = least;
      range[i * 2 + 1] = most;
    });
    double* spread = c.workspace<double>(rows * n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;
      const i64 p = slot < part.sinks ? parts : (slot - part.sinks) / lag;
      if (p >= part.judged(kv.length[row])) return;
      const float* r = range + (row * parts + p) * d * 2;
      const i64 at = kv.physical(row, slot) * d;
      double mean = 0, square = 0;
      for (i64 pass = 0; pass < 2; ++pass) {
        double sum = 0;
        for (i64 e = 0; e < d; ++e) {
          const double low = r[e * 2], width = r[e * 2 + 1] - low;
          const double scaled = width > 0 ? (load(x, kv.dtype, at + e) - low) / width : 0.0;
          sum += pass ? (scaled - mean) * (scaled - mean) : scaled;
        }
        (pass ? square : mean) = pass ? sum : sum / static_cast<double>(d);
      }
      spread[i] = sqrt(square / static_cast<double>(d - 1));
    });
    const double elements = 1.0 * rows * n * d;
    c.charge(2.0 * elements * size_of(kv.dtype), 8.0 * elements);
    return spread;
  }
};
}  // namespace

LACUNA_PLUGIN(LagKv)
