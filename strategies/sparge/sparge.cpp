// SpargeAttention (Zhang et al. 2025, "SpargeAttention: accurate and training-free sparse attention accelerating any
// model inference", arXiv 2502.18137): its selection of tiles; the skipping of P V work inside a kernel is left out.
//
//   k' = k minus its mean over the sequence;  Q[t], K[b] = mean query, mean k' of the tiles (128 queries, 64 keys)
//   similarity = mean of the tile's cosine Gram matrix, the diagonal included; a tile is similar where it is > theta
//   (a partial last tile is not)
//   dissimilar key tiles: read by every query tile;  dissimilar query tiles: read every visible key tile; for others:
//     p = softmax of Q[t] . K[b] / sqrt(d) over the similar visible key tiles
//     top: the best max(1, floor(top * all key tiles))            (early rows read all that they see)
//     cdf: the longest descending prefix with sum <= cdf, at least one tile (the crossing tile excluded)
//   nothing else is forced.
// A budget ranks instead of top and cdf: dissimilar key tiles first, inside it, then the others by p; a dissimilar
// query tile is ranked like the others. Preset cdf: the original's other call.
#include <algorithm>
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

LACUNA_HD inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

/// Vectors in rows of `length`, cut into tiles of `tile`.
struct QueryVectors {
  Queries q;
  i64 rows, length, tile;
  LACUNA_HD float at(i64 row, i64 i, i64 e) const { return q.at(row / q.heads, row % q.heads, i, e); }
};
struct CentredKeys {
  Paged kv;
  const float* mean;  // [rows, head_dim]
  i64 rows, length, tile;
  LACUNA_HD float at(i64 row, i64 i, i64 e) const { return kv.key(row, i, e) - mean[row * kv.head_dim + e]; }
};

/// similar [rows, tiles]: 1 where the mean cosine of a tile's vectors, each pair and itself, exceeds theta. Workspace:
/// [rows, length] and [rows, tiles, d] floats.
template <class Vectors>
void find_similar(Context& c, const Vectors& x, i64 d, double theta, i32* similar) {
  const i64 tiles = ceil_div(x.length, x.tile);
  float *scale = c.workspace<float>(x.rows * x.length), *square = c.workspace<float>(x.rows * tiles * d);
  c.for_each(x.rows * x.length, [=] LACUNA_HD(i64 i) {
    double sum = 0;
    for (i64 e = 0; e < d; ++e) {
      const double v = static_cast<double>(x.at(i / x.length, i % x.length, e));
      sum += v * v;
    }
    scale[i] = static_cast<float>(1. / sqrt(sum));  // of a zero vector: its tile becomes NaN, and dissimilar
  });
  c.for_each(x.rows * tiles * d, [=] LACUNA_HD(i64 i) {
    const i64 row = i / d / tiles, begin = i / d % tiles * x.tile;
    if (begin + x.tile > x.length) return;
    double sum = 0;
    for (i64 n = begin; n < begin + x.tile; ++n)
      sum += static_cast<double>(x.at(row, n, i % d)) * static_cast<double>(scale[row * x.length + n]);
    const double mean = sum / static_cast<double>(x.tile);
    square[i] = static_cast<float>(mean * mean);
  });
  c.for_each(x.rows * tiles, [=] LACUNA_HD(i64 i) {
    double sum = 0;
    for (i64 e = 0; e < d; ++e) sum += static_cast<double>(square[i * d + e]);
    similar[i] = (i % tiles + 1) * x.tile <= x.length && sum > theta;
  });
  const double elements = static_cast<double>(x.rows * x.length * d);
  c.charge(4. * elements, 4. * elements);
}

struct Sparge : Strategy {
  struct Params {
    Ints tiles = {128, 64};
    double theta = -0.1, top = 0.5, cdf = 0;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("tiles", &Params::tiles, "queries and keys of a tile", "1..4096")
        .field("theta", &Params::theta, "tiles whose mean cosine is not above it are never left out", "-1..1")
        .field("top", &Params::top, "share of all key tiles that a query tile reads", "0..1")
        .knob("cdf", &Params::cdf, "share of the estimated mass, instead of top; 0: top", "0..1")
        .require("tiles", "tiles holds two numbers", [](const Params& p) { return p.tiles.size() == 2; });
  }
  static Info info() {
    Info i{};
    i.name = "sparge";
    i.summary = "tiles ranked by their mean query and key where those stand for them";
    i.paper = "Zhang et al. 2025, arXiv 2502.18137";
    i.rule = "p = softmax of the tiles' mean query . mean key; the best by count or sum; dissimilar tiles always";
    i.phases = kPrefill;
    i.presets = R"({"original": {}, "cdf": {"theta": 0.6, "cdf": 0.98}})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.q_tile = params.tiles[0];
    p.unit_tokens = params.tiles[1];
    p.max_tokens = 0;
    const Layer& l = c.layer();
    const i64 heads = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads,
              kv_rows = static_cast<i64>(c.call().num_seqs) * l.num_kv_heads;
    const i64 q_tiles = ceil_div(p.max_cached, p.q_tile), k_tiles = ceil_div(p.max_cached, p.unit_tokens);
    const i64 of_tiles = (heads * q_tiles + kv_rows * k_tiles) * (2 * l.head_dim + 1);
    const i64 of_tokens = (heads + kv_rows) * p.max_cached, rows = heads * q_tiles;
    p.workspace_bytes = 4 * (of_tiles + of_tokens + kv_rows * l.head_dim + rows * (k_tiles + 3)) + 16 * 256;
  }

  /// What the rows of a call choose from.
  struct Tiles {
    Rows rows;
    i64 q_tiles, k_tiles, unit;
    i32 kv_heads;
    const i32 *similar_q, *similar_k;  // [query heads, q_tiles], [KV rows, k_tiles]
    float* p;                          // [rows, k_tiles]
    i32 *visible, *wanted;             // [rows]

    LACUNA_HD i64 query(i64 row) const { return row / rows.tiles * q_tiles + rows.tile_of(row); }
    LACUNA_HD i64 key(i64 row, i64 unit_index) const { return rows.kv_row(row, kv_heads) * k_tiles + unit_index; }
    LACUNA_HD i64 end(i64 row) const { return rows.first_position + rows.query_end(row); }
  };

  void mark(Context& c, const Budget& budget, Selection& out) override {
    const Tiles t = estimate(c, out.rows);
    const i32 rows = static_cast<i32>(out.rows.count());
    i32 *const pieces = out.pieces, *const count = out.piece_count;
    const i64 capacity = out.piece_capacity;
    if (budget.limited) {
      want_budget(c, budget, t);
    } else {
      if (params.cdf > 0) c.topp(t.p, rows, t.k_tiles, t.visible, nullptr, params.cdf, pieces, count, capacity);
      want_own(c, t, count);
    }
    take_first(c, budget, t);
    c.topk(t.p, rows, t.k_tiles, t.visible, t.wanted, pieces, count, capacity);
    c.for_each(rows * capacity, [=] LACUNA_HD(i64 i) {
      if (i % capacity < count[i / capacity]) pieces[i] *= static_cast<i32>(t.unit);
    });
  }

  /// Similarity of the tiles; p of the similar visible ones, 0 for the others.
  Tiles estimate(Context& c, const Rows& rows) {
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const i64 d = q.head_dim, heads = static_cast<i64>(q.seqs) * q.heads, kv_rows = kv.rows;
    const i64 q_tile = params.tiles[0], k_tile = params.tiles[1], length = rows.first_position + rows.num_queries;
    const i64 q_tiles = ceil_div(q.count, q_tile), k_tiles = ceil_div(length, k_tile);
    float *queries = c.workspace<float>(heads * q_tiles * d), *keys = c.workspace<float>(kv_rows * k_tiles * d);
    float* mean = c.workspace<float>(kv_rows * d);
    c.mean_queries(q, params.tiles[0], false, queries);
    c.mean_keys(params.tiles[1], false, keys);
    c.for_each(kv_rows * d, [=] LACUNA_HD(i64 i) {
      double sum = 0;
      for (i64 b = 0; b < k_tiles; ++b) {
        const i64 tokens = (b + 1) * k_tile < length ? k_tile : length - b * k_tile;
        sum += static_cast<double>(tokens) * static_cast<double>(keys[(i / d * k_tiles + b) * d + i % d]);
      }
      mean[i] = static_cast<float>(sum / static_cast<double>(length));
    });
    i32 *similar_q = c.workspace<i32>(heads * q_tiles), *similar_k = c.workspace<i32>(kv_rows * k_tiles);
    find_similar(c, QueryVectors{q, heads, q.count, q_tile}, d, params.theta, similar_q);
    find_similar(c, CentredKeys{kv, mean, kv_rows, length, k_tile}, d, params.theta, similar_k);
    const Tiles t{rows,
                  q_tiles,
                  k_tiles,
                  k_tile,
                  c.layer().num_kv_heads,
                  similar_q,
                  similar_k,
                  c.workspace<float>(rows.count() * k_tiles),
                  c.workspace<i32>(rows.count()),
                  c.workspace<i32>(rows.count())};
    pooled_softmax(c, t, queries, keys, mean, d);
    return t;
  }

  static void pooled_softmax(Context& c, const Tiles& t, const float* queries, const float* keys, const float* mean,
                             i64 d) {
    const i64 k_tiles = t.k_tiles;
    const float scale = c.layer().softmax_scale;
    c.for_each(t.rows.count() * k_tiles, [=] LACUNA_HD(i64 i) {
      const i64 row = i / k_tiles, key = t.key(row, i % k_tiles);
      if (i % k_tiles * t.unit >= t.end(row) || !t.similar_k[key]) return;
      const float *a = queries + t.query(row) * d, *b = keys + key * d, *m = mean + key / k_tiles * d;
      double sum = 0;
      for (i64 e = 0; e < d; ++e) sum += static_cast<double>(a[e]) * static_cast<double>(b[e] - m[e]);
      t.p[i] = static_cast<float>(sum * scale);
    });
    c.for_each(t.rows.count(), [=] LACUNA_HD(i64 row) {
      float* p = t.p + row * k_tiles;
      const i64 visible = ceil_div(t.end(row), t.unit);
      float top = -INFINITY;
      double sum = 0;
      for (i64 b = 0; b < visible; ++b)
        if (t.similar_k[t.key(row, b)] && p[b] > top) top = p[b];
      for (i64 b = 0; b < visible; ++b) {
        p[b] = t.similar_k[t.key(row, b)] ? expf(p[b] - top) : 0.f;
        sum += static_cast<double>(p[b]);
      }
      for (i64 b = 0; b < visible && sum > 0; ++b) p[b] = static_cast<float>(static_cast<double>(p[b]) / sum);
      t.visible[row] = static_cast<i32>(visible);
    });
    const double pairs = .5 * static_cast<double>(t.rows.count() * k_tiles);
    c.charge(4. * static_cast<double>(t.rows.count() * d) + 8. * pairs, (2. * static_cast<double>(d) + 4.) * pairs);
  }

  /// The original's own counts, dissimilar tiles on top. `reaching`: where a cdf is given, how many tiles reach it; the
  /// one that crosses it is left out.
  void want_own(Context& c, const Tiles& t, const i32* reaching) {
    const bool by_sum = params.cdf > 0;
    const i32 crossing = params.cdf < 1;
    const i64 top = static_cast<i64>(params.top * static_cast<double>(t.k_tiles) + 1e-9);
    c.for_each(t.rows.count(), [=] LACUNA_HD(i64 row) {
      i64 similar = 0, chosen = by_sum ? reaching[row] - crossing : top;
      for (i64 b = 0; b < t.visible[row]; ++b) similar += t.similar_k[t.key(row, b)];
      if (chosen < 1) chosen = 1;
      const i64 wanted = (chosen < similar ? chosen : similar) + t.visible[row] - similar;
      t.wanted[row] = t.similar_q[t.query(row)] ? static_cast<i32>(wanted) : t.visible[row];
    });
  }

  /// All that is visible where the target reaches it, else whole tiles inside the row's pairs.
  static void want_budget(Context& c, const Budget& budget, const Tiles& t) {
    const i64 *tokens = budget.tokens, *pairs = budget.pairs;
    c.for_each(t.rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 fitting = pairs[row] / (t.unit * (t.rows.query_end(row) - t.rows.query_begin(row)));
      const i64 wanted = fitting > 1 ? fitting : 1;
      t.wanted[row] = tokens[row] >= t.end(row) || wanted > t.visible[row] ? t.visible[row] : static_cast<i32>(wanted);
    });
  }

  /// Dissimilar key tiles, and those that hold forced tokens, come before all others.
  static void take_first(Context& c, const Budget& budget, const Tiles& t) {
    const i64 sinks = budget.sinks, recent = budget.recent, k_tiles = t.k_tiles;
    c.for_each(t.rows.count() * k_tiles, [=] LACUNA_HD(i64 i) {
      const i64 row = i / k_tiles, b = i % k_tiles;
      const bool forced =
          b * t.unit < sinks ||
          (recent > 0 && (b + 1) * t.unit > t.rows.first_position + t.rows.query_begin(row) - recent + 1);
      if (forced || !t.similar_k[t.key(row, b)]) t.p[i] = INFINITY;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(Sparge)
