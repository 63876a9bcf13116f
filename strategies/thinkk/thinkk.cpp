// ThinK (Xu et al. 2024, "ThinK: thinner key cache by query-driven pruning", arXiv 2407.21018)
//
//   s(c)    = mean over the last `window` queries of q_c^2, mean over the group, times the mean of k_c^2 over all kept
//             keys, for each KV head
//   dropped = the floor(ratio * head_dim) channels with the lowest s, ties to the higher channel
//   the last `recent` keys, and all that come later, keep every channel; no token is evicted
//
// After RoPE, like the authors' code, which prunes per query head on keys that are repeated: `gqa = union` (a channel
// goes if every query head of the group drops it) comes nearest; the mean is kvpress' ThinKPress, which drops the
// channels of recent keys too (recent = 0). Over a base of eviction it would prune what that keeps; here it stands
// alone.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct ThinkK : Strategy {
  static constexpr i64 kPart = 256;  // keys that one thread sums

  struct Params {
    double ratio = .4;
    i32 window = 32, recent = 32;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("ratio", &Params::ratio, "share of the key channels that is dropped", "0..<1")
        .field("window", &Params::window, "last queries that weigh the channels", "1..")
        .field("recent", &Params::recent, "last keys that keep all channels", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "thinkk";
    i.summary = "key channels dropped by the last queries' and the keys' mean squares";
    i.paper = "Xu et al. 2024, arXiv 2407.21018";
    i.rule = "s(c) = mean q_c^2 * mean k_c^2; the lowest ratio of the channels is dropped from all but recent keys";
    i.phases = kEvict;
    i.presets = R"({"original": {"gqa": "union"}, "kvpress": {"recent": 0}})";
    i.dense_point = R"({"ratio": 0.0})";
    i.query_aware = 1;
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    const i64 rows = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads, parts = (p.max_cached + kPart - 1) / kPart;
    p.per_query_head = 0;
    p.workspace_bytes = 8 * rows * l.head_dim * (parts + 3) + 4 * 256;
  }

  void retain(Context& c, const Budget& b, Kept& kept) override {
    const Selection set = kept.set;
    const Paged kv = c.kv();
    const i64 slots = kv.max_length;
    c.for_each(b.rows.count() * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots;
      if (slot == 0) set.token_count[row] = kv.length[row];
      if (slot < kv.length[row]) set.tokens[row * set.token_capacity + slot] = static_cast<i32>(slot);
    });
  }

  void rewrite(Context& c, const Rewrite& w) override {
    const Queries q = c.last_queries(params.window);
    const Paged kv = c.kv();
    const Rewrite out = w;
    const i64 d = w.head_dim, group = c.layer().group(), recent = params.recent;
    const bool unite = common.gqa == Gqa::union_, largest = common.gqa == Gqa::max;
    const double* keys = mean_squares(c, w);
    double* squares = c.workspace<double>(w.rows * group * d);
    c.for_each(w.rows * group * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, head = i / d % q.heads, seq = i / d / q.heads;
      double sum = 0;
      for (i64 n = 0; n < q.count; ++n) {
        const double x = q.at(seq, head, n, e);
        sum += x * x;
      }
      squares[i] = sum / static_cast<double>(q.count);
    });
    const i64 votes = unite ? group : 1;
    double* score = c.workspace<double>(w.rows * group * d);
    c.for_each(w.rows * votes * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, vote = i / d % votes, row = i / d / votes;
      double of_queries = 0;
      for (i64 g = unite ? vote : 0; g < (unite ? vote + 1 : group); ++g) {
        const double x = squares[(row * group + g) * d + e];
        of_queries = largest ? (x > of_queries ? x : of_queries) : of_queries + x;
      }
      score[i] = of_queries * keys[row * d + e];
    });
    const i64 dropped = static_cast<i64>(params.ratio * static_cast<double>(d) + 1e-9);
    c.for_each(w.rows * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, row = i / d;
      bool drop = true;
      for (i64 vote = 0; vote < votes && drop; ++vote) {
        const double* of = score + (row * votes + vote) * d;
        i64 below = 0;
        for (i64 other = 0; other < d; ++other) below += of[other] < of[e] || (of[other] == of[e] && other > e);
        drop = below < dropped;
      }
      out.drop_channel[i] = drop ? 1 : 0;
      const i64 until = kv.length[row] - recent;
      if (e == 0) out.channels_dropped_until[row] = static_cast<i32>(until > 0 ? until : 0);
    });
    c.charge(static_cast<double>(w.rows * group * q.count * d) * size_of(q.dtype),
             2.0 * static_cast<double>(w.rows * group * (q.count + d) * d));
  }

  /// Of the kept keys, each channel: [rows, head_dim].
  double* mean_squares(Context& c, const Rewrite& w) {
    const Rewrite kept = w;
    const i64 d = w.head_dim, parts = (w.slots + kPart - 1) / kPart;
    double *partial = c.workspace<double>(w.rows * parts * d), *mean = c.workspace<double>(w.rows * d);
    c.for_each(w.rows * parts * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, part = i / d % parts, row = i / d / parts;
      double sum = 0;
      for (i64 place = part * kPart; place < (part + 1) * kPart && place < kept.kept_count[row]; ++place) {
        const double x = kept.k[(row * kept.slots + kept.kept[row * kept.slots + place]) * d + e];
        sum += x * x;
      }
      partial[i] = sum;
    });
    c.for_each(w.rows * d, [=] LACUNA_HD(i64 i) {
      double sum = 0;
      for (i64 part = 0; part < parts; ++part) sum += partial[(i / d * parts + part) * d + i % d];
      mean[i] = sum / static_cast<double>(kept.kept_count[i / d]);
    });
    const double elements = static_cast<double>(w.rows * w.slots * d);
    c.charge(elements * size_of(c.kv().dtype), 2.0 * elements);
    return mean;
  }
};
}  // namespace

LACUNA_PLUGIN(ThinkK)
