// Clusters of keys, as RetroInfer ranks them (Chen et al. 2025, "RetroInfer: a vector-storage approach for scalable
// long-context LLM inference", arXiv 2505.02922)
//
//   once, at the end of the prompt, per KV head: the keys between the first `sinks` and the prompt's last `recent` in
//   equal segments of about `segment`; in each, k-means with a cluster for every `per_cluster` keys: from evenly spaced
//   keys, `iterations` rounds of (centroids to length 1, every key to the largest inner product, mean)
//   score(cluster) = softmax over clusters of q . centroid * softmax_scale, summed over the group (gqa)
//   read: the first `sinks`, the prompt's last `recent` and all generated tokens; of the others
//     with a budget   the tokens of the best clusters, in the last one those at the lowest positions
//     with top_p      the clusters that reach this share of the scores
//     else            the best floor(exact * clusters) clusters, at least one
//   estimate: of the clusters with tokens that are not read, the best floor(estimated * clusters) are attended to as
//   one token each: the centroid, the mean value of the keys' tokens, and log(tokens not read) added to the logit
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/gqa.hpp>
#include <lacuna/sdk/kmeans.hpp>
#include <lacuna/sdk/prompt.hpp>
#include <lacuna/sdk/softmax.hpp>

namespace {
using namespace lacuna::sdk;

/// Segments of equal length, with clusters of their own. Cluster 0 is none: what is not clustered has it.
struct Segments {
  i32 *begin, *end;  // [rows] slots
  i64 segment, per_cluster, clusters;

  LACUNA_HD IndexRange tokens(i64 row) const { return {begin[row], end[row]}; }
  LACUNA_HD i64 count(i64 row) const {
    const i64 n = (tokens(row).size() + segment / 2) / segment;
    return n > 1 ? n : 1;
  }
  LACUNA_HD IndexRange tokens_of_segment(i64 row, i64 index) const {
    const i64 n = tokens(row).size(), of = count(row);
    return {begin[row] + index * n / of, begin[row] + (index + 1) * n / of};
  }
  LACUNA_HD i64 clusters_for(i64 keys) const { return keys > per_cluster ? keys / per_cluster : 1; }
  LACUNA_HD i64 clusters_at_most(i64 row) const {  // of a segment
    return clusters_for((tokens(row).size() + count(row) - 1) / count(row));
  }
  LACUNA_HD IndexRange tokens_of(i64 row, i64 cluster) const {
    if (cluster == 0 || tokens(row).size() == 0) return {0, 0};
    const i64 most = clusters_at_most(row), index = (cluster - 1) / most;
    if (index >= count(row)) return {0, 0};
    const IndexRange of = tokens_of_segment(row, index);
    return (cluster - 1) % most < clusters_for(of.size()) ? of : IndexRange{0, 0};
  }
  LACUNA_HD IndexRange clusters_of(i64 row, i64 slot) const {
    const i64 index = ((slot - begin[row] + 1) * count(row) - 1) / tokens(row).size();
    const i64 first = 1 + index * clusters_at_most(row);
    return {first, first + clusters_for(tokens_of_segment(row, index).size())};
  }
};

constexpr i64 kParts = 128;  // of a row's minimum

struct Cluster : Strategy {
  struct Params {
    i32 segment = 8192, per_cluster = 16;
    double exact = 0.018, estimated = 0.232;
    bool estimate = true;
    double top_p = 0;
    i32 sinks = 4, recent = 64;
    i32 iterations = 10;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("segment", &Params::segment, "keys that are clustered together, about", "1..")
        .field("per_cluster", &Params::per_cluster, "keys of a cluster on average", "1..")
        .field("exact", &Params::exact, "share of the clusters whose tokens are read, where no budget is given", "0..1")
        .field("estimate", &Params::estimate, "attend to centroids for the next best clusters")
        .field("estimated", &Params::estimated, "share of the clusters that centroids stand for", "0..1")
        .field("top_p", &Params::top_p, "share of the scores that is read instead; 0: none", "0..1")
        .field("sinks", &Params::sinks, "first tokens, always read", "0..1000000000")
        .field("recent", &Params::recent, "last tokens of the prompt, always read", "0..1000000000")
        .field("iterations", &Params::iterations, "rounds of k-means", "1..1000");
  }
  static Info info() {
    Info i{};
    i.name = "cluster";
    i.summary = "clusters of keys ranked by their centroid";
    i.paper = "Chen et al. 2025, arXiv 2505.02922";
    i.rule =
        "score(cluster) = softmax over clusters of q . centroid, summed over the group; the tokens of the best ones, "
        "sinks, last prompt tokens and generated ones; centroids with mean values for the next best";
    i.phases = kDecode;
    i.defaults = R"({"gqa": "sum"})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.cost =
        "(d_h / per_cluster + 1) S H_kv elements read, 2 d_h S / per_cluster H FLOPs; once, iterations times 2 d_h "
        "segment "
        "/ per_cluster S H_kv FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    const i64 heads = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads;
    max_clusters = 4 + p.max_cached / params.per_cluster + 2 * (p.max_cached / params.segment);
    const i64 room = l.num_kv_heads * max_clusters;
    p.per_query_head = ranks_each_head(common.gqa);
    p.max_pieces = 0;
    p.sides[p.num_sides++] = {"cluster", SidePer::token, 1, Dtype::i32, 1, 1};
    p.states[p.num_states++] = {"centroid", Dtype::f32, room * l.head_dim};
    p.states[p.num_states++] = {"size", Dtype::i32, room};
    p.states[p.num_states++] = {"clusters", Dtype::i32, l.num_kv_heads};
    p.states[p.num_states++] = {"fixed", Dtype::i32, 1};
    p.workspace_bytes = 4 * heads * (9 * max_clusters + 1 + p.max_cached + 2 * kParts + 12) + softmax_bytes(heads);
    if (!params.estimate) return;
    p.states[p.num_states++] = {"value", Dtype::f32, room * l.head_dim};
    p.max_extras = static_cast<i64>(params.estimated * static_cast<double>(max_clusters)) + 1;
  }

  void index(Context& c, const Dirty& dirty) override {
    if (dirty.max_units > 1) cluster(c);  // later a token comes at a time, and is read
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    const auto cluster_of = c.side<i32>("cluster");
    const Paged kv = c.kv();
    const Selection out = s;
    const Rows rows = s.rows;
    const i64 *target = b.tokens, prompt = prompt_end(c), count = rows.count(), slots = kv.max_length;
    const i64 clusters = max_clusters, sinks = params.sinks, recent = params.recent;
    const i32 limited = b.limited, kv_heads = c.layer().num_kv_heads;
    float* value = c.workspace<float>(count * slots);
    i32 *end = c.workspace<i32>(count), *wanted = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 kv_row = rows.kv_row(row, kv_heads), length = kv.length[kv_row];
      const i64 middle = kv.visible(kv_row, prompt - 1) - recent;
      end[row] = static_cast<i32>(middle > 0 ? middle : 0);
      const i64 left = target[row] - (middle > sinks ? length - (middle - sinks) : length);
      wanted[row] = static_cast<i32>(!limited ? length : left > 0 ? left : 0);
      out.full[row] = limited && target[row] >= length;
      out.exact_sinks[row] = static_cast<i32>(sinks);
      out.exact_window[row] = static_cast<i32>(length - end[row]);
    });
    const i32* cached = cached_members(c, end, count / kv.rows);
    const float* scores = cluster_scores(c, rows, cached);
    const float* ranked = limited ? scores : best_clusters(c, rows, scores);
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots, kv_row = rows.kv_row(row, kv_heads);
      if (slot >= end[row]) return;
      const i32 of = cluster_of.at(kv_row, slot);
      value[i] = slot < sinks ? -INFINITY : of == 0 ? INFINITY : ranked[row * clusters + of];
    });
    c.topk(value, static_cast<i32>(count), slots, end, wanted, out.tokens, out.token_count, out.token_capacity);
    c.charge(4.0 * static_cast<double>(count) * static_cast<double>(slots), 0);
    if (params.estimate) estimate(c, out, scores, ranked, cached);
  }

  /// [KV rows, clusters]: members that are cached; `end` of every heads_per_row-th row bounds those that were
  /// clustered.
  const i32* cached_members(Context& c, const i32* end, i64 heads_per_row) const {
    const auto cluster_of = c.side<i32>("cluster");
    const Paged kv = c.kv();
    const i64 clusters = max_clusters;
    const i32* size = c.state<i32>("size");
    i32* held = c.workspace<i32>(kv.rows * clusters);
    c.for_each(kv.rows * clusters, [=] LACUNA_HD(i64 i) {
      const i64 row = i / clusters, n = kv.length[row];
      held[i] = size[i];
      if (n == 0 || kv.position_of(row, n - 1) == n - 1) return;  // nothing was evicted
      held[i] = 0;
      for (i64 slot = 0; slot < end[row * heads_per_row]; ++slot) held[i] += cluster_of.at(row, slot) == i % clusters;
    });
    return held;
  }

  i64 max_clusters = 0;  // of a KV head, the one that is none included; fixed by plan()

  /// Clusters the prompt's middle keys on the first call with keys, for good.
  void cluster(Context& c) const {
    const Paged kv = c.kv();
    const i64 d = kv.head_dim, clusters = max_clusters, prompt = prompt_end(c);
    const i32 kv_heads = c.layer().num_kv_heads, sinks = params.sinks, recent = params.recent;
    const Segments cut{c.workspace<i32>(kv.rows), c.workspace<i32>(kv.rows), params.segment, params.per_cluster,
                       clusters};
    const KeyClusters<i32, Segments> keys{
        kv, cut, 1, Affinity::product, c.state<float>("centroid"), c.side<i32>("cluster")};
    i32 *fixed = c.state<i32>("fixed"), *size = c.state<i32>("size"), *number = c.state<i32>("clusters");
    c.for_each(kv.rows, [=] LACUNA_HD(i64 row) {
      if (fixed[row / kv_heads]) return;  // nothing is clustered
      cut.begin[row] = sinks;
      cut.end[row] = kv.visible(row, prompt - 1) - recent;
      if (cut.tokens(row).size() == 0) return;
      i64 there = 0;
      for (i64 g = 0; g < cut.count(row); ++g) there += cut.clusters_for(cut.tokens_of_segment(row, g).size());
      number[row] = static_cast<i32>(there);
    });
    start_evenly(c, keys);
    for (i32 i = 0; i < params.iterations; ++i) {
      normalise(c, keys);
      assign_nearest(c, keys);
      mean_of_members(c, keys, kv.k, keys.centroid);
    }
    if (params.estimate) mean_of_members(c, keys, kv.v, c.state<float>("value"));
    c.for_each(kv.rows * clusters, [=] LACUNA_HD(i64 i) {
      const IndexRange tokens = cut.tokens_of(i / clusters, i % clusters);
      i32 members = 0;
      for (i64 slot = tokens.begin; slot < tokens.end; ++slot)
        members += keys.code.at(i / clusters, slot) == i % clusters;
      if (tokens.size() > 0) size[i] = members;
    });
    c.for_each(kv.rows / kv_heads, [=] LACUNA_HD(i64 seq) { fixed[seq] = kv.length[seq * kv_heads] > 0; });
    const double of_round = static_cast<double>(kv.rows) * static_cast<double>(kv.max_length * d);
    const double together = static_cast<double>(params.segment) / params.per_cluster;
    c.charge(params.iterations * of_round * 2.0 * size_of(kv.dtype), params.iterations * of_round * 2.0 * together);
  }

  static void normalise(Context& c, const KeyClusters<i32, Segments>& keys) {
    const i64 clusters = keys.cut.clusters, d = keys.kv.head_dim;
    c.for_each(keys.kv.rows * clusters, [=] LACUNA_HD(i64 i) {
      if (keys.cut.tokens_of(i / clusters, i % clusters).size() == 0) return;
      double squares = 0;
      for (i64 e = 0; e < d; ++e) squares += static_cast<double>(keys.centroid[i * d + e]) * keys.centroid[i * d + e];
      for (i64 e = 0; e < d && squares > 0; ++e)
        keys.centroid[i * d + e] = static_cast<float>(keys.centroid[i * d + e] / sqrt(squares));
    });
  }

  /// [rows, clusters]: -inf where a cluster has no members; size [KV rows, clusters].
  const float* cluster_scores(Context& c, const Rows& rows, const i32* size) const {
    const float* centroid = c.state<float>("centroid");
    const Queries q = c.current_queries();
    const float scale = c.layer().softmax_scale;
    const i64 d = q.head_dim, heads = static_cast<i64>(q.seqs) * q.heads, group = c.layer().group();
    const i64 clusters = max_clusters;
    float* logits = c.workspace<float>(heads * clusters);
    c.for_each(heads * clusters, [=] LACUNA_HD(i64 i) {
      const i64 head = i / clusters, at = head / group * clusters + i % clusters;
      double sum = 0;
      for (i64 e = 0; e < d; ++e)
        sum += static_cast<double>(q.at(head / q.heads, head % q.heads, 0, e)) * centroid[at * d + e];
      logits[i] = size[at] > 0 ? static_cast<float>(sum * scale) : -INFINITY;
    });
    const double scored = static_cast<double>(clusters) * static_cast<double>(d);
    c.charge(4.0 * scored * static_cast<double>(heads / group), 2.0 * scored * static_cast<double>(heads));
    softmax_rows(c, logits, heads, clusters, clusters);
    if (ranks_each_head(common.gqa)) return logits;
    float* reduced = c.workspace<float>(rows.count() * clusters);
    c.group_reduce(logits, reduced, clusters, clusters, reduce_of(common.gqa));
    return reduced;
  }

  /// [rows, clusters]: 1 for the clusters that are read where there is no budget, -inf for the others.
  const float* best_clusters(Context& c, const Rows& rows, const float* scores) const {
    const i32* number = c.state<i32>("clusters");
    const i64 clusters = max_clusters, count = rows.count();
    const i32 kv_heads = c.layer().num_kv_heads;
    const double exact = params.exact;
    float *mass = c.workspace<float>(count * clusters), *chosen = c.workspace<float>(count * clusters);
    i32 *list = c.workspace<i32>(count * clusters), *all = c.workspace<i32>(count), *wanted = c.workspace<i32>(count),
        *found = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const double share = floor(exact * number[rows.kv_row(row, kv_heads)] + 1e-9);
      all[row] = static_cast<i32>(clusters);
      wanted[row] = share > 1 ? static_cast<i32>(share) : 1;
    });
    c.for_each(count * clusters, [=] LACUNA_HD(i64 i) {
      mass[i] = scores[i] > 0 ? scores[i] : 0.f;
      chosen[i] = -INFINITY;
    });
    if (params.top_p > 0)
      c.topp(mass, static_cast<i32>(count), clusters, all, nullptr, params.top_p, list, found, clusters);
    else
      c.topk(scores, static_cast<i32>(count), clusters, all, wanted, list, found, clusters);
    c.for_each(count * clusters, [=] LACUNA_HD(i64 i) {
      if (i % clusters < found[i / clusters]) chosen[i / clusters * clusters + list[i]] = 1.f;
    });
    return chosen;
  }

  /// The centroids that stand for the best clusters of which something is not read.
  void estimate(Context& c, const Selection& out, const float* scores, const float* ranked, const i32* size) const {
    const Rows rows = out.rows;
    const i64 clusters = max_clusters, count = rows.count(), room = out.extra_capacity, d = c.layer().head_dim;
    const i32 kv_heads = c.layer().num_kv_heads;
    const double estimated = params.estimated;
    const i32* unread = tokens_not_read(c, out, ranked, size);
    const i32* number = c.state<i32>("clusters");
    const float *centroid = c.state<float>("centroid"), *mean_value = c.state<float>("value");
    float* left = c.workspace<float>(count * clusters);
    i32 *list = c.workspace<i32>(count * room), *all = c.workspace<i32>(count), *wanted = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const double share = floor(estimated * number[rows.kv_row(row, kv_heads)] + 1e-9);
      all[row] = static_cast<i32>(clusters);
      wanted[row] = out.full[row] ? 0 : static_cast<i32>(share);
    });
    c.for_each(count * clusters, [=] LACUNA_HD(i64 i) { left[i] = unread[i] > 0 ? scores[i] : -INFINITY; });
    c.topk(left, static_cast<i32>(count), clusters, all, wanted, list, out.extra_count, room);
    c.for_each(count * room * d, [=] LACUNA_HD(i64 i) {
      const i64 e = i % d, extra = i / d % room, row = i / d / room;
      if (extra >= out.extra_count[row]) return;
      const i64 of = list[row * room + extra], at = (rows.kv_row(row, kv_heads) * clusters + of) * d + e;
      out.extra_k[i] = centroid[at];
      out.extra_v[i] = mean_value[at];
      if (e == 0)
        out.extra_log_weight[i / d] = static_cast<float>(log(static_cast<double>(unread[row * clusters + of])));
    });
    c.charge(16.0 * static_cast<double>(count * room) * static_cast<double>(d), 0);
  }

  /// [rows, clusters]. A cluster is read wholly or not at all, but for those whose score is the lowest that was read.
  const i32* tokens_not_read(Context& c, const Selection& out, const float* ranked, const i32* size) const {
    const auto cluster_of = c.side<i32>("cluster");
    const Rows rows = out.rows;
    const i64 clusters = max_clusters, count = rows.count();
    const i32 kv_heads = c.layer().num_kv_heads;
    float *lows = c.workspace<float>(count * kParts), *low = c.workspace<float>(count);
    c.for_each(count * kParts, [=] LACUNA_HD(i64 i) {
      const i64 row = i / kParts, kv_row = rows.kv_row(row, kv_heads);
      const i32* tokens = out.tokens + row * out.token_capacity;
      float least = INFINITY;
      for (i64 n = i % kParts; n < out.token_count[row]; n += kParts) {
        const i32 of = cluster_of.at(kv_row, tokens[n]);
        if (of != 0 && ranked[row * clusters + of] < least) least = ranked[row * clusters + of];
      }
      lows[i] = least;
    });
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      low[row] = INFINITY;
      for (i64 p = row * kParts; p < (row + 1) * kParts; ++p) low[row] = lows[p] < low[row] ? lows[p] : low[row];
    });
    i32* unread = c.workspace<i32>(count * clusters);
    c.for_each(count * clusters, [=] LACUNA_HD(i64 i) {
      const i64 row = i / clusters, of = i % clusters, kv_row = rows.kv_row(row, kv_heads);
      const i32* tokens = out.tokens + row * out.token_capacity;
      i32 members = 0;
      if (ranked[i] == low[row])
        for (i64 n = 0; n < out.token_count[row]; ++n) members += cluster_of.at(kv_row, tokens[n]) == of;
      unread[i] = ranked[i] > low[row] ? 0 : size[kv_row * clusters + of] - members;
    });
    return unread;
  }
};
}  // namespace

LACUNA_PLUGIN(Cluster)
