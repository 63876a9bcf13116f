// Value merging (kvpress MergingPress; cf. Wan et al. 2024, "D2O", arXiv 2406.13035)
//
//   the base decides what is kept; then, for each KV head and evicted token e:
//     t = the kept token whose key (after RoPE) has the largest cosine with k_e, ties to the lower position
//     e takes part if cos >= threshold and it is among the E - ceil((1 - fraction) (E - 1)) most similar of the head's
//     E evicted tokens: those that reach the (1 - fraction) quantile a = max(cos, 0) |v_e| / (|v_e| + |v_t| + 1e-6),
//     with the values as they were before
//   v_t = (v_t + sum of a v_e) / (1 + sum of a), over the tokens that chose t
//
// Keys stay. It evicts when the base does.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Merge : Strategy {
  struct Params {
    Base base{R"({"name": "snapkv"})"};
    double threshold = 0, fraction = 1;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that decides what is kept")
        .field("threshold", &Params::threshold, "least cosine of two keys that merge", "-1..1")
        .field("fraction", &Params::fraction, "share of the evicted tokens, the most similar ones, that merges",
               "0<..1");
  }
  static Info info() {
    Info i{};
    i.name = "merge";
    i.summary = "evicted values merged into the kept token with the most similar key";
    i.paper = "-";
    i.rule = "t = argmax cos(k_e, k_t); v_t = (v_t + sum a v_e) / (1 + sum a), a = max(cos, 0) |v_e| / (|v_e| + |v_t|)";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    p.workspace_bytes = rows * p.max_cached * (2 * 8 + 7 * 4) + rows * 8 + 11 * 256;
  }

  void score(Context& c, Scores& s) override {
    c.base_scores(s);
    budget_ = s.budget_tokens;
  }

  void rewrite(Context& c, const Rewrite& w) override {
    const Rewrite out = w;
    const i64 slots = w.slots, d = w.head_dim, count = w.rows * slots;
    float* cosine = c.workspace<float>(count);  // with the nearest kept key; -inf: not evicted
    i32* target = c.workspace<i32>(count);      // place of that key
    double *key_norm = c.workspace<double>(count), *value_norm = c.workspace<double>(count);
    find_targets(c, w, key_norm, value_norm, cosine, target);
    const i32* chosen = most_similar(c, w, cosine);

    // A list for each kept place of those that merge into it, ascending.
    i32 *first = c.workspace<i32>(count), *next = c.workspace<i32>(count);
    const float threshold = static_cast<float>(params.threshold);
    c.for_each(w.rows, [=] LACUNA_HD(i64 row) {
      for (i64 i = 0; i < out.kept_count[row]; ++i) first[row * slots + i] = -1;
      for (i64 slot = slots - 1; slot >= 0; --slot) {
        const i64 at = row * slots + slot;
        if (!chosen[at] || cosine[at] < threshold) continue;
        i32& head = first[row * slots + target[at]];
        next[at] = head;
        head = static_cast<i32>(slot);
      }
    });
    c.for_each(count * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, place = i / d % slots, row = i / d / slots;
      if (place >= out.kept_count[row] || first[row * slots + place] < 0) return;
      const i64 kept = row * slots + out.kept[row * slots + place];
      double sum = out.v[kept * d + e], weight = 1;
      for (i32 slot = first[row * slots + place]; slot >= 0; slot = next[row * slots + slot]) {
        const i64 gone = row * slots + slot;
        const double likeness = cosine[gone] > 0.f ? static_cast<double>(cosine[gone]) : 0.0;
        const double a = likeness * value_norm[gone] / (value_norm[gone] + value_norm[kept] + 1e-6);
        sum += a * static_cast<double>(out.v[gone * d + e]);
        weight += a;
      }
      out.v[kept * d + e] = static_cast<float>(sum / weight);
    });
    const double kept = budget_ < 0 || budget_ > slots ? slots : budget_, pairs = w.rows * kept * (slots - kept);
    c.charge(2.0 * count * d * size_of(c.kv().dtype), 2.0 * pairs * d + 4.0 * count * d);
  }

  /// For every evicted token its nearest kept key; norms of all keys and values.
  static void find_targets(Context& c, const Rewrite& w, double* key_norm, double* value_norm, float* cosine,
                           i32* target) {
    const Rewrite in = w;
    const Paged kv = c.kv();
    const i64 slots = w.slots, d = w.head_dim, count = w.rows * slots;
    const float never = -INFINITY;
    i32* is_kept = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots;
      if (slot < in.kept_count[row]) is_kept[row * slots + in.kept[i]] = 1;
      if (slot >= kv.length[row]) return;
      double k = 0, v = 0;
      for (i64 e = i * d; e < (i + 1) * d; ++e) {
        k += static_cast<double>(in.k[e]) * in.k[e];
        v += static_cast<double>(in.v[e]) * in.v[e];
      }
      key_norm[i] = sqrt(k);
      value_norm[i] = sqrt(v);
    });
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots;
      cosine[i] = never;
      if (i % slots >= kv.length[row] || is_kept[i]) return;
      double best = -2;
      for (i64 place = 0; place < in.kept_count[row]; ++place) {
        const i64 other = row * slots + in.kept[row * slots + place];
        double dot = 0;
        for (i64 e = 0; e < d; ++e) dot += static_cast<double>(in.k[i * d + e]) * in.k[other * d + e];
        const double norms = key_norm[i] * key_norm[other], likeness = norms > 0 ? dot / norms : 0;
        if (likeness <= best) continue;
        best = likeness;
        target[i] = static_cast<i32>(place);
      }
      cosine[i] = static_cast<float>(best);
    });
  }

  /// [rows, slots] 1: among the share of the evicted tokens that merges.
  const i32* most_similar(Context& c, const Rewrite& w, const float* cosine) {
    const Rewrite in = w;
    const Paged kv = c.kv();
    const i64 slots = w.slots, count = w.rows * slots;
    const double left = 1 - params.fraction;
    i32 *wanted = c.workspace<i32>(w.rows), *size = c.workspace<i32>(w.rows);
    i32 *best = c.workspace<i32>(count), *chosen = c.workspace<i32>(count);
    c.for_each(w.rows, [=] LACUNA_HD(i64 row) {
      const i64 evicted = kv.length[row] - in.kept_count[row];
      wanted[row] = evicted < 1 ? 0 : static_cast<i32>(evicted - static_cast<i64>(ceil(left * (evicted - 1) - 1e-9)));
    });
    c.topk(cosine, w.rows, slots, kv.length, wanted, best, size, slots);
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots;
      if (i % slots < size[row]) chosen[row * slots + best[i]] = 1;
    });
    return chosen;
  }

  i64 budget_ = -1;  // of the eviction at hand
};
}  // namespace

LACUNA_PLUGIN(Merge)
