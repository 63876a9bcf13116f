// CaM (Zhang et al. 2024, "CaM: cache merging for memory-efficient LLMs inference", ICML 2024)
//
//   the base decides what is kept; then, for each KV head and evicted token e:
//     T  = the next `targets` kept tokens after e (fewer where fewer follow)
//     p  = clamp(A(e) / mean of A over T, 0, 1), A = the newest query's attention, mean over the group
//     with probability p, by a draw keyed by (seed, layer, step, KV head, position of e): v_t += v_e / |T| for t in T
//
// After the prompt (E) every evicted token draws once, by the row of the last prompt query. While decoding (D) it acts
// when the base does: over one that evicts at every step each token that leaves draws once, by the row of that step,
// which is the authors' procedure (they have sinks and recent tokens, and 32 targets always). kvpress merges only the
// best of the evicted, every 512 steps, by accumulated attention.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Cam : Strategy {
  struct Params {
    Base base{R"({"name": "h2o"})"};
    i32 targets = 32;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that decides what is kept")
        .field("targets", &Params::targets, "kept tokens after an evicted one that share its value", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "cam";
    i.summary = "evicted values merged at random into the kept tokens that follow";
    i.paper = "Zhang et al. 2024, ICML";
    i.rule = "with probability clamp(A(e) / mean A(T), 0, 1): v_t += v_e / |T| for the next kept tokens T";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0, "base": {"name": "snapkv"}})";
    i.stochastic = 1;
    i.query_aware = 1;
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    const Layer& l = c.layer();
    p.workspace_bytes =
        static_cast<i64>(c.call().num_seqs) * p.max_cached * (4 * l.num_qo_heads + 12 * l.num_kv_heads) + 4 * 256;
  }

  void score(Context& c, Scores& s) override { c.base_scores(s); }

  void rewrite(Context& c, const Rewrite& w) override {
    const Rewrite out = w;
    const Queries q = c.last_queries(1);
    const i64 slots = w.slots, d = w.head_dim, count = w.rows * slots, targets = params.targets;
    float* of_heads = c.workspace<float>(static_cast<i64>(q.seqs) * q.heads * slots);
    float* mass = c.workspace<float>(count);
    c.window_mass(q, Reduce::sum, of_heads, nullptr, slots);
    c.group_reduce(of_heads, mass, slots, slots, Reduce::mean);
    const float* share = draw(c, w, mass);
    c.for_each(count * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, place = i / d % slots, row = i / d / slots;
      if (place >= out.kept_count[row]) return;
      const i32* kept = out.kept + row * slots;
      double sum = out.v[(row * slots + kept[place]) * d + e];
      const double before = sum;
      for (i64 slot = place < targets ? 0 : kept[place - targets] + 1; slot < kept[place]; ++slot) {
        const i64 gone = row * slots + slot;
        if (share[gone] > 0.f) sum += static_cast<double>(out.v[gone * d + e]) * share[gone];
      }
      if (sum != before) out.v[(row * slots + kept[place]) * d + e] = static_cast<float>(sum);
    });
    c.charge(2.0 * count * d * size_of(c.kv().dtype), 2.0 * count * d * static_cast<double>(targets));
  }

  /// [rows, slots] 1 / |T| of the evicted tokens that merge, else 0.
  const float* draw(Context& c, const Rewrite& w, const float* mass) {
    const Rewrite in = w;
    const Paged kv = c.kv();
    const Random random = c.random();
    const i64 slots = w.slots, count = w.rows * slots, targets = params.targets;
    float* share = c.workspace<float>(count);
    i32* is_kept = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots;
      if (i % slots < in.kept_count[row]) is_kept[row * slots + in.kept[i]] = 1;
    });
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots, held = in.kept_count[row];
      if (slot >= kv.length[row] || is_kept[i]) return;
      const i32* kept = in.kept + row * slots;
      i64 begin = 0, end = held;  // the first kept place after the token
      while (begin < end) {
        const i64 middle = (begin + end) / 2;
        if (kept[middle] > slot)
          end = middle;
        else
          begin = middle + 1;
      }
      const i64 last = begin + targets < held ? begin + targets : held;
      if (last == begin) return;
      double sum = 0;
      for (i64 place = begin; place < last; ++place) sum += static_cast<double>(mass[row * slots + kept[place]]);
      const double mean = sum / static_cast<double>(last - begin), own = mass[i];
      const double u = random.uniform(static_cast<u64>(row), static_cast<u64>(kv.position_of(row, slot)));
      if (own > 0 && u * mean < own) share[i] = 1.f / static_cast<float>(last - begin);
    });
    return share;
  }
};
}  // namespace

LACUNA_PLUGIN(Cam)
