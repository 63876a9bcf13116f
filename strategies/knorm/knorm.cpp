// Key norm (Devoto et al. 2024, "A simple and effective L2 norm-based strategy for KV cache compression",
// arXiv 2406.11430)
//
//   score(j) = -|k_j|   per KV head, key after RoPE; nothing forced
//
// The original leaves layers 0 and 1 dense, kvpress none (preset).
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct KNorm : Strategy {
  static Info info() {
    Info i{};
    i.name = "knorm";
    i.summary = "tokens ranked by a small key norm";
    i.paper = "Devoto et al. 2024, arXiv 2406.11430";
    i.rule = "score(j) = -|k_j|; layers 0 and 1 dense";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean", "dense_layers": [0, 1]})";
    i.presets = R"({"original": {}, "kvpress": {"dense_layers": []}})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 0;
  }

  void score(Context& c, Scores& s) override {
    const Paged kv = c.kv();
    const i64 rows = s.rows.count(), n = kv.max_length, stride = s.stride;
    float* value = s.value;
    c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;  // rows are KV heads
      if (slot >= kv.length[row]) return;
      const i64 at = kv.physical(row, slot) * kv.head_dim;
      double sum = 0;
      for (i64 e = 0; e < kv.head_dim; ++e) {
        const double k = load(kv.k, kv.dtype, at + e);
        sum += k * k;
      }
      value[row * stride + slot] = -static_cast<float>(sqrt(sum));
    });
    const double elements = 1.0 * rows * n * kv.head_dim;
    c.charge(elements * size_of(kv.dtype) + 4.0 * rows * n, 2.0 * elements);
  }
};
}  // namespace

LACUNA_PLUGIN(KNorm)
