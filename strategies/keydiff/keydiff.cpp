// KeyDiff (Park et al. 2025, "KeyDiff: key similarity-based KV cache eviction for long-context LLM inference in
// resource-constrained environments", arXiv 2504.15364)
//
//   anchor   = mean over the cached tokens of k_j / |k_j|
//   score(j) = -cos(k_j, anchor)   per KV head, keys after RoPE; nothing forced
//
// One cut over all tokens, as kvpress makes it; the paper iterates over blocks of the prompt.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/reductions.hpp>

namespace {
using namespace lacuna::sdk;

/// Channel e of a key over its norm.
struct UnitKeys {
  Paged kv;
  const double* norm;  // [rows, max_length]

  LACUNA_HD double operator()(i64 row, i64 slot, i64 e) const {
    return slot < kv.length[row] ? kv.key(row, slot, e) / norm[row * kv.max_length + slot] : 0.0;
  }
};

struct KeyDiff : Strategy {
  static Info info() {
    Info i{};
    i.name = "keydiff";
    i.summary = "tokens ranked by how little their key resembles the mean key";
    i.paper = "Park et al. 2025, arXiv 2504.15364";
    i.rule = "score(j) = -cos(k_j, mean of the normalised keys)";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
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
    p.workspace_bytes = rows * p.max_cached * 8 + 256 + row_sums_bytes(rows, p.max_cached, c.layer().head_dim);
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride, d = kv.head_dim;
    double* norm = c.workspace<double>(rows * n);
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot >= kv.length[row]) return;
      const i64 at = kv.physical(row, slot) * d;
      double sum = 0;
      for (i64 e = 0; e < d; ++e) {
        const double k = load(kv.k, kv.dtype, at + e);
        sum += k * k;
      }
      norm[i] = sum > 0 ? sqrt(sum) : 1.0;
    });
    const double* anchor = row_sums(c, rows, n, d, UnitKeys{kv, norm});  // its length does not matter
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;
      if (slot >= kv.length[row]) return;
      const i64 at = kv.physical(row, slot) * d;
      double dot = 0, square = 0;
      for (i64 e = 0; e < d; ++e) {
        const double a = anchor[row * d + e];
        dot += a * load(kv.k, kv.dtype, at + e);
        square += a * a;
      }
      value[row * stride + slot] = square > 0 ? -static_cast<float>(dot / (norm[i] * sqrt(square))) : 0.f;
    });
    const double elements = 1.0 * rows * n * d;
    c.charge(2.0 * elements * size_of(kv.dtype) + 12.0 * rows * n, 6.0 * elements);
  }
};
}  // namespace

LACUNA_PLUGIN(KeyDiff)
