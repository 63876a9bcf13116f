// PQCache (Zhang et al. 2024, "PQCache: product quantization-based KVCache for long context LLM inference", arXiv
// 2407.12820)
//
//   once, at the end of the prompt, per KV head: the prompt's keys after the sinks, cut into `subvectors` runs of
//   channels, 2^bits Euclidean centroids for each run by k-means;  a key's code = its nearest centroids
//   logit(token) = softmax_scale * sum over runs of q_run . centroid of the token's code
//   candidates: the tokens between the `sinks` first ones and the recent window
//   score = softmax of the logits over the candidates, summed over the group (gqa)
//   n = target less the sinks: floor(recent_fraction * n) tokens are the most recent (at least the current one), the
//   best candidates are the rest.
//
// The original starts k-means from random keys and stops by a timing model; here from evenly spaced keys, with a fixed
// number of iterations. It keeps the counts of the prompt's end and its sinks beside them; here both follow the target
// of the step. It clusters the keys before the window only; the window depends on the budget, which is not known when
// keys are indexed, so here the last keys of the prompt are clustered too. Where at most 2^bits tokens follow the sinks
// the original reads everything; here the budget holds.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/gqa.hpp>
#include <lacuna/sdk/kmeans.hpp>
#include <lacuna/sdk/prompt.hpp>
#include <lacuna/sdk/softmax.hpp>

namespace {
using namespace lacuna::sdk;

/// All tokens of a row share all clusters.
struct OneCut {
  i32 *begin, *end;  // [rows] slots
  i64 clusters;

  LACUNA_HD IndexRange tokens(i64 row) const { return {begin[row], end[row]}; }
  LACUNA_HD IndexRange tokens_of(i64 row, i64) const { return tokens(row); }
  LACUNA_HD IndexRange clusters_of(i64, i64) const { return {0, clusters}; }
};

struct PqCache : Strategy {
  struct Params {
    i32 subvectors = 2, bits = 6;
    i32 sinks = 32;
    double recent_fraction = 0.5;
    i32 iterations = 10;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("subvectors", &Params::subvectors, "runs of channels that are quantised by themselves", "1..256")
        .field("bits", &Params::bits, "of a run's code: 2^bits centroids", "1..8")
        .field("sinks", &Params::sinks, "first tokens, always read", "0..1000000000")
        .field("recent_fraction", &Params::recent_fraction, "share of the target that is the most recent tokens",
               "0..1")
        .field("iterations", &Params::iterations, "of k-means", "0..1000");
  }
  static Info info() {
    Info i{};
    i.name = "pqcache";
    i.summary = "tokens ranked by product-quantised keys";
    i.paper = "Zhang et al. 2024, arXiv 2407.12820";
    i.rule =
        "softmax over candidates of q . PQ(k), summed over the group; sinks and a recent window forced, the best "
        "candidates fill the rest";
    i.phases = kDecode;
    i.defaults = R"({"gqa": "sum"})";
    i.dense_point = R"({"density": 1.0})";
    i.cost =
        "subvectors S H_kv bytes read, (subvectors S + 2 d_h 2^bits) H FLOPs; once, iterations times 3 d_h 2^bits S "
        "H_kv "
        "FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    if (l.head_dim % params.subvectors != 0)
      throw Failure("subvectors = " + std::to_string(params.subvectors) + " does not divide the head size " +
                    std::to_string(l.head_dim));
    const i64 heads = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads;
    p.per_query_head = ranks_each_head(common.gqa);
    p.max_pieces = 0;
    p.sides[p.num_sides++] = {"codes", SidePer::token, 1, Dtype::u8, params.subvectors, 1};
    p.states[p.num_states++] = {"centroids", Dtype::f32, l.num_kv_heads * centroids() * l.head_dim};
    p.states[p.num_states++] = {"fixed", Dtype::i32, 1};
    p.workspace_bytes =
        4 * heads * (params.subvectors * centroids() + 2 * p.max_cached + 2) + 4 * 256 + softmax_bytes(heads);
  }

  void index(Context& c, const Dirty& dirty) override {
    const i64 rows = dirty.rows, units = dirty.max_units, subvectors = params.subvectors, d = c.layer().head_dim;
    const OneCut cut{c.workspace<i32>(rows), c.workspace<i32>(rows), centroids()};
    if (units > 1) cluster(c, cut);  // later a token comes at a time
    const auto keys = clusters(c, cut);
    const i32 sinks = params.sinks;
    c.for_each(rows * units * subvectors, [=] LACUNA_HD(i64 i) {
      const i64 part = i % subvectors, row = i / subvectors / units, slot = dirty.begin[row] + i / subvectors % units;
      if (slot < dirty.end[row] && slot >= sinks)
        keys.code.at(row, slot, part) = static_cast<u8>(keys.nearest(row, slot, part));
    });
    charge_assignment(c, static_cast<double>(rows) * static_cast<double>(units), d);
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    if (!b.limited) throw Failure("pqcache needs a budget: density, tokens or units");
    const Paged kv = c.kv();
    const Selection out = s;
    const Rows rows = s.rows;
    const i64* target = b.tokens;
    const double recent_fraction = params.recent_fraction;
    const i32 kv_heads = c.layer().num_kv_heads;
    const i64 sinks = params.sinks, count = rows.count();
    i32 *candidates = c.workspace<i32>(count), *wanted = c.workspace<i32>(count);
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 length = kv.length[rows.kv_row(row, kv_heads)], beyond = target[row] - sinks;
      const i64 share = beyond > 0 ? static_cast<i64>(floor(recent_fraction * static_cast<double>(beyond) + 1e-9)) : 0;
      const i64 recent = share > 1 ? share : 1, between = length - recent - sinks;
      out.full[row] = target[row] >= length;
      out.exact_sinks[row] = static_cast<i32>(sinks);
      out.exact_window[row] = static_cast<i32>(recent);
      candidates[row] = static_cast<i32>(between > 0 ? between : 0);
      wanted[row] = static_cast<i32>(beyond > recent && !out.full[row] ? beyond - recent : 0);
    });
    const i64 slots = kv.max_length, first = sinks < slots ? sinks : slots;
    const float* scores = candidate_scores(c, rows, candidates);
    c.topk(scores + first, static_cast<i32>(count), slots, candidates, wanted, out.tokens, out.token_count,
           out.token_capacity);
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      if (i % slots < out.token_count[i / slots])
        out.tokens[i / slots * out.token_capacity + i % slots] += static_cast<i32>(first);
    });
  }

  i64 centroids() const { return i64{1} << params.bits; }

  KeyClusters<u8, OneCut> clusters(Context& c, const OneCut& cut) const {
    return {c.kv(), cut, params.subvectors, Affinity::distance, c.state<float>("centroids"), c.side<u8>("codes")};
  }

  void charge_assignment(Context& c, double keys, i64 d) const {
    c.charge(keys * static_cast<double>(size_of(c.kv().dtype) * d + params.subvectors),
             3.0 * keys * static_cast<double>(d * centroids()));
  }

  /// Fixes the centroids on the first call with keys, for good.
  void cluster(Context& c, const OneCut& cut) const {
    const Paged kv = c.kv();
    const i64 prompt = prompt_end(c);
    const i32 kv_heads = c.layer().num_kv_heads, sinks = params.sinks;
    i32* fixed = c.state<i32>("fixed");
    c.for_each(kv.rows, [=] LACUNA_HD(i64 row) {
      if (fixed[row / kv_heads]) return;  // nothing is clustered
      cut.begin[row] = sinks;
      cut.end[row] = kv.visible(row, prompt - 1);
    });
    const auto keys = clusters(c, cut);
    start_evenly(c, keys);
    for (i32 i = 0; i < params.iterations; ++i) {
      assign_nearest(c, keys);
      mean_of_members(c, keys, kv.k, keys.centroid);
      charge_assignment(c, static_cast<double>(kv.rows) * kv.max_length, kv.head_dim);
    }
    c.for_each(kv.rows / kv_heads, [=] LACUNA_HD(i64 seq) { fixed[seq] = kv.length[seq * kv_heads] > 0; });
  }

  /// [rows, max_length]: of the candidates, that many after the sinks; -inf elsewhere.
  const float* candidate_scores(Context& c, const Rows& rows, const i32* candidates) const {
    const auto codes = c.side<u8>("codes");
    const float* centroid = c.state<float>("centroids");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const float scale = c.layer().softmax_scale;
    const i64 d = q.head_dim, subvectors = params.subvectors, width = d / subvectors, means = centroids();
    const i64 heads = static_cast<i64>(q.seqs) * q.heads, group = c.layer().group(), slots = kv.max_length;
    const i64 sinks = params.sinks, heads_of_row = heads / rows.count();
    float *table = c.workspace<float>(heads * subvectors * means), *logits = c.workspace<float>(heads * slots);
    c.for_each(heads * subvectors * means, [=] LACUNA_HD(i64 i) {
      const i64 mean = i % means, part = i / means % subvectors, head = i / means / subvectors;
      const float* of_run = centroid + (head / group * means + mean) * d + part * width;
      double sum = 0;
      for (i64 e = 0; e < width; ++e)
        sum += static_cast<double>(q.at(head / q.heads, head % q.heads, 0, part * width + e)) * of_run[e];
      table[i] = static_cast<float>(sum * scale);
    });
    c.for_each(heads * slots, [=] LACUNA_HD(i64 i) {
      const i64 slot = i % slots, head = i / slots;
      float sum = -INFINITY;
      if (slot >= sinks && slot < sinks + candidates[head / heads_of_row]) {
        sum = 0.f;
        for (i64 part = 0; part < subvectors; ++part)
          sum += table[(head * subvectors + part) * means + codes.at(head / group, slot, part)];
      }
      logits[i] = sum;
    });
    const double scored = static_cast<double>(slots * subvectors);
    c.charge(scored * static_cast<double>(kv.rows),
             scored * static_cast<double>(heads) + 2.0 * static_cast<double>(heads * means * d));
    softmax_rows(c, logits, heads, slots, slots);
    if (ranks_each_head(common.gqa)) return logits;
    float* reduced = c.workspace<float>(rows.count() * slots);
    c.group_reduce(logits, reduced, slots, slots, reduce_of(common.gqa));
    return reduced;
  }
};
}  // namespace

LACUNA_PLUGIN(PqCache)
