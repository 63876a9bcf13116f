// FlexPrefill (Lai et al. 2025, "FlexPrefill: a context-aware sparse attention mechanism for efficient long-sequence
// inference", arXiv 2502.20766)
//
//   A = causal softmax of the last `last_q` queries;  column(j), diagonal(o) = means of A over columns and offsets
//   v, s = tokens of the shortest descending prefixes of column, diagonal that reach gamma (the crossing one included)
//   level = block: v and s in blocks of 128 (n / 128 + 1), at least min_tokens each; column summed per key block,
//     diagonal per band of `block` offsets (from the farthest on: the nearest band holds the remainder); key block 0
//     and the nearest band first, then the best. Band o stands for the one block (i, i - o) of each query block i.
//     E = softmax of (mean last query . mean key of each block) / sqrt(d), T = column per block
//     a head with sqrt(JS(E, T)) < tau (natural logarithms) is query-aware: its columns and diagonals fall to
//     min_tokens, and added are the best pairs of blocks of the whole head by the row softmax of mean query . mean key,
//     as long as their sum stays <= gamma * rows (the crossing pair excluded).
//     A prompt of at most max(2 block, min_tokens rounded up to blocks) is dense.
//   level = token (preset sparse_frontier, Nawrot et al. 2025, arXiv 2504.17768): the best max(min_tokens, v) columns
//     and max(min_tokens, s) diagonals themselves, the first 4 columns and the nearest 64 offsets first, lowered as
//     vertical_slash does; no head is query-aware.
// The preset's numbers are those of that study's configuration file.
#include <algorithm>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/slash.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i64 kCountedBlock = 128;                      // the original counts in these whatever its blocks
constexpr i32 kForcedColumns = 4, kForcedOffsets = 64;  // level = token
constexpr i32 kTile = 64;                               // level = token: queries of a tile, tokens of a piece

LACUNA_HD inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

/// Mean keys of blocks against mean queries.
struct PooledKeys {
  const float* data;  // [KV rows, blocks, d]
  i64 blocks, d, group;
  float scale;  // of the layer's softmax

  LACUNA_HD float logit(const float* query, i64 head, i64 block) const {
    const float* k = data + (head / group * blocks + block) * d;
    double sum = 0;
    for (i64 e = 0; e < d; ++e) sum += static_cast<double>(query[e]) * static_cast<double>(k[e]);
    return static_cast<float>(sum * scale);
  }
};

/// flag [rows, n] becomes 1 at the listed places of each row and 0 elsewhere.
void flag_listed(Context& c, i64 rows, i64 n, const i32* list, const i32* count, float* flag) {
  c.for_each(rows * n, [=] LACUNA_HD(i64 i) { flag[i] = 0.f; });
  c.for_each(rows * n, [=] LACUNA_HD(i64 i) {
    if (i % n < count[i / n]) flag[i / n * n + list[i]] = 1.f;
  });
}

struct FlexPrefill : Strategy {
  struct Params {
    i32 block = 128, min_tokens = 1024, last_q = 128;
    double gamma = 0.9, tau = 0.1;
    std::string level = "block";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("block", &Params::block, "queries of a tile and keys of a block (level block)", "1..4096")
        .knob("gamma", &Params::gamma, "share of the last queries' mass that columns and diagonals each cover", "0..1")
        .field("tau", &Params::tau, "heads whose divergence is below it are query-aware (level block)", "0..1")
        .field("min_tokens", &Params::min_tokens, "least columns, and least diagonals", "0..")
        .field("last_q", &Params::last_q, "last queries whose attention ranks", "1..")
        .field("level", &Params::level, "columns and diagonals in blocks, or single ones", "block|token");
  }
  static Info info() {
    Info i{};
    i.name = "flexprefill";
    i.summary = "columns and diagonals, or pairs of blocks, that cover a share of the mass";
    i.paper = "Lai et al. 2025, arXiv 2502.20766";
    i.rule =
        "columns and diagonals covering gamma of the last queries' softmax; pooled block pairs in query-aware heads";
    i.phases = kPrefill;
    i.presets = R"({"original": {},
      "sparse_frontier": {"level": "token", "gamma": 0.65, "tau": 0, "min_tokens": 512, "last_q": 512}})";
    i.dense_point = R"({"min_tokens": 2147483647})";
    i.takes_budget = 0;
    return i;
  }

  bool by_token() const { return params.level == "token"; }

  void plan(Context& c, Plan& p) override {
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads,
              kv_rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    const i64 length = p.max_cached, d = c.layer().head_dim;
    p.workspace_bytes = 20 * 256 + 4 * heads * 8;
    if (by_token()) {
      p.q_tile = p.unit_tokens = kTile;
      p.max_pieces = most_slash_pieces(length, kTile, kTile);
      p.max_tokens = length;
      p.workspace_bytes += 4 * 4 * heads * length;
      return;
    }
    p.q_tile = p.unit_tokens = params.block;
    p.max_tokens = 0;
    const i64 blocks = ceil_div(length, params.block), pairs = params.tau > 0 ? blocks * blocks : 0;
    p.workspace_bytes += 4 * (heads * (3 * length + (5 + d) * blocks + d + 2 * pairs) + kv_rows * blocks * d);
  }

  /// A head a row of every array.
  struct Ranking {
    i64 heads, length;
    float *column, *diagonal;  // [heads, length]
    i32 *n, *v, *s;            // [heads] candidates; columns and diagonals that cover gamma
    i32* list;                 // [heads, length] scratch
  };

  void mark(Context& c, const Budget&, Selection& out) override {
    const i64 length = out.rows.first_position + out.rows.num_queries, block = params.block;
    if (by_token()) return mark_tokens(c, out);
    if (length > std::max(2 * block, ceil_div(params.min_tokens, block) * block)) return mark_blocks(c, out);
    i32* const full = out.full;
    c.for_each(out.rows.count(), [=] LACUNA_HD(i64 row) { full[row] = 1; });
  }

  Ranking rank(Context& c, const Rows& rows) {
    Ranking r{};
    r.heads = static_cast<i64>(rows.seqs) * rows.heads;
    r.length = rows.first_position + rows.num_queries;
    r.column = c.workspace<float>(r.heads * r.length);
    r.diagonal = c.workspace<float>(r.heads * r.length);
    r.list = c.workspace<i32>(r.heads * r.length);
    for (i32** counts : {&r.n, &r.v, &r.s}) *counts = c.workspace<i32>(r.heads);
    c.window_mass(c.last_queries(params.last_q), Reduce::mean, r.column, r.diagonal, r.length);
    c.for_each(r.heads, [=] LACUNA_HD(i64 h) { r.n[h] = static_cast<i32>(r.length); });
    const i32 heads = static_cast<i32>(r.heads);
    c.topp(r.column, heads, r.length, r.n, nullptr, params.gamma, r.list, r.v, r.length);
    c.topp(r.diagonal, heads, r.length, r.n, nullptr, params.gamma, r.list, r.s, r.length);
    return r;
  }

  // ---- level = token

  void mark_tokens(Context& c, Selection& out) {
    const Ranking r = rank(c, out.rows);
    const Slashes chosen{r.heads,
                         r.length,
                         r.list,
                         c.workspace<i32>(r.heads * r.length),
                         c.workspace<i32>(r.heads),
                         c.workspace<i32>(r.heads)};
    const i64 least = std::min<i64>(params.min_tokens, r.length);
    c.for_each(r.heads * r.length, [=] LACUNA_HD(i64 i) {
      const i64 at = i % r.length, head = i / r.length;
      if (at < kForcedColumns) r.column[i] = INFINITY;
      if (at < kForcedOffsets) r.diagonal[i] = INFINITY;
      if (at > 0) return;
      if (r.v[head] < least) r.v[head] = static_cast<i32>(least);
      if (r.s[head] < least) r.s[head] = static_cast<i32>(least);
    });
    const i32 heads = static_cast<i32>(r.heads);
    c.topk(r.column, heads, r.length, r.n, r.v, chosen.columns, chosen.num_columns, r.length);
    c.topk(r.diagonal, heads, r.length, r.n, r.s, chosen.diagonals, chosen.num_diagonals, r.length);
    lower_slashes(c, out.rows, chosen, kTile, false, &out, nullptr);
  }

  // ---- level = block

  /// A head a row of every array.
  struct Blocks {
    i64 heads, count, block;
    float *column, *diagonal;  // [heads, count]: mass, then 1 for the chosen ones
    float* pair;               // [heads, count, count]: likewise, 0 in heads that are not query-aware; or null
    i32 *list, *listed;        // scratch: places chosen, how many
    i32* aware;                // [heads]

    LACUNA_HD i32 blocks_for(i64 head, i64 tokens, i64 least) const {
      const i64 own = aware[head] ? 0 : tokens / kCountedBlock + 1, blocks = own > least ? own : least;
      return static_cast<i32>(blocks < count ? blocks : count);
    }
  };

  void mark_blocks(Context& c, Selection& out) {
    const Ranking r = rank(c, out.rows);
    const i64 count = ceil_div(r.length, params.block);
    const Blocks b{r.heads,
                   count,
                   params.block,
                   c.workspace<float>(r.heads * count),
                   c.workspace<float>(r.heads * count),
                   params.tau > 0 ? c.workspace<float>(r.heads * count * count) : nullptr,
                   c.workspace<i32>(r.heads * count * (params.tau > 0 ? count : 1)),
                   c.workspace<i32>(r.heads),
                   c.workspace<i32>(r.heads)};
    sum_blocks(c, r, b);
    if (b.pair) take_pairs(c, r, b);
    take_slashes(c, r, b);
    const Rows rows = out.rows;
    i32 *const pieces = out.pieces, *const piece_count = out.piece_count;
    const i64 capacity = out.piece_capacity;
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 head = row / rows.tiles, i = rows.tile_of(row);
      i32 n = 0;
      for (i64 j = 0; j <= i; ++j) {
        const bool slash = b.column[head * count + j] > 0.f || b.diagonal[head * count + i - j] > 0.f;
        if (slash || (b.pair && b.pair[(head * count + i) * count + j] > 0.f))
          pieces[row * capacity + n++] = static_cast<i32>(j * b.block);
      }
      piece_count[row] = n;
    });
  }

  static void sum_blocks(Context& c, const Ranking& r, const Blocks& b) {
    const i64 nearest = r.length - (b.count - 1) * b.block;  // offsets of the nearest band
    c.for_each(r.heads * b.count, [=] LACUNA_HD(i64 i) {
      const i64 at = i % b.count, base = i / b.count * r.length;
      double columns = 0, diagonals = 0;
      for (i64 j = at * b.block; j < (at + 1) * b.block && j < r.length; ++j)
        columns += static_cast<double>(r.column[base + j]);
      for (i64 o = at == 0 ? 0 : nearest + (at - 1) * b.block; o < nearest + at * b.block; ++o)
        diagonals += static_cast<double>(r.diagonal[base + o]);
      b.column[i] = static_cast<float>(columns);
      b.diagonal[i] = static_cast<float>(diagonals);
    });
    c.charge(8. * static_cast<double>(r.heads * r.length), 2. * static_cast<double>(r.heads * r.length));
  }

  /// Query-aware heads, and their pairs of blocks.
  void take_pairs(Context& c, const Ranking& r, const Blocks& b) {
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const i64 d = q.head_dim, count = b.count;
    float *last = c.workspace<float>(b.heads * d), *queries = c.workspace<float>(b.heads * count * d),
          *keys = c.workspace<float>(kv.rows * count * d), *estimate = c.workspace<float>(b.heads * count);
    c.mean_queries(c.last_queries(params.last_q), params.last_q, false, last);
    c.mean_queries(q, params.block, false, queries);
    c.mean_keys(params.block, false, keys);
    const PooledKeys pooled{keys, count, d, q.heads / c.layer().num_kv_heads, c.layer().softmax_scale};
    c.for_each(b.heads * count,
               [=] LACUNA_HD(i64 i) { estimate[i] = pooled.logit(last + i / count * d, i / count, i % count); });
    find_aware(c, b, estimate);
    c.for_each(b.heads * count * count, [=] LACUNA_HD(i64 x) {
      const i64 head = x / count / count, i = x / count % count, j = x % count;
      if (b.aware[head] && j <= i) b.pair[x] = pooled.logit(queries + (head * count + i) * d, head, j);
    });
    c.for_each(b.heads * count, [=] LACUNA_HD(i64 x) {
      if (b.aware[x / count]) softmax(b.pair + x * count, x % count + 1);
    });
    const i32 heads = static_cast<i32>(b.heads), crossing = params.gamma < 1;
    const i64 pairs = count * count;
    c.for_each(b.heads, [=] LACUNA_HD(i64 h) { r.n[h] = b.aware[h] ? static_cast<i32>(pairs) : 0; });
    c.topp(b.pair, heads, pairs, r.n, nullptr, params.gamma, b.list, b.listed, pairs);
    i32* wanted = c.workspace<i32>(b.heads);
    c.for_each(b.heads, [=] LACUNA_HD(i64 h) { wanted[h] = b.listed[h] > 0 ? b.listed[h] - crossing : 0; });
    c.topk(b.pair, heads, pairs, r.n, wanted, b.list, b.listed, pairs);
    flag_listed(c, b.heads, pairs, b.list, b.listed, b.pair);
    const double products = .5 * static_cast<double>(b.heads * pairs);
    c.charge(4. * static_cast<double>((b.heads + kv.rows) * count * d) + 12. * products,
             (2. * static_cast<double>(d) + 4.) * products);
  }

  /// Softmax of x[0..n) in place.
  LACUNA_HD static void softmax(float* x, i64 n) {
    float top = x[0];
    for (i64 i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
    double sum = 0;
    for (i64 i = 0; i < n; ++i) sum += exp(static_cast<double>(x[i] - top));
    for (i64 i = 0; i < n; ++i) x[i] = static_cast<float>(exp(static_cast<double>(x[i] - top)) / sum);
  }

  /// aware[head]: sqrt(JS(estimate, columns per block)) < tau; a zero in either makes it NaN, and the head is not.
  void find_aware(Context& c, const Blocks& b, float* estimate) {
    const double tau = params.tau;
    c.for_each(b.heads, [=] LACUNA_HD(i64 head) {
      float* p = estimate + head * b.count;
      softmax(p, b.count);
      double sum = 0;
      bool positive = true;
      for (i64 j = 0; j < b.count && positive; ++j) {
        const double e = static_cast<double>(p[j]), t = static_cast<double>(b.column[head * b.count + j]);
        positive = e > 0 && t > 0;
        if (positive) sum += .5 * (e * log(2 * e / (e + t)) + t * log(2 * t / (e + t)));
      }
      b.aware[head] = positive && sqrt(sum > 0 ? sum : 0) < tau;
    });
  }

  /// The chosen columns and diagonals in blocks.
  void take_slashes(Context& c, const Ranking& r, const Blocks& b) {
    const i64 count = b.count, least = std::max<i64>(ceil_div(params.min_tokens, kCountedBlock), 1);
    c.for_each(b.heads, [=] LACUNA_HD(i64 h) {
      r.n[h] = static_cast<i32>(count);
      r.v[h] = b.blocks_for(h, r.v[h], least);
      r.s[h] = b.blocks_for(h, r.s[h], least);
      b.column[h * count] = b.diagonal[h * count] = INFINITY;
    });
    const i32 heads = static_cast<i32>(b.heads);
    c.topk(b.column, heads, count, r.n, r.v, b.list, b.listed, count);
    flag_listed(c, b.heads, count, b.list, b.listed, b.column);
    c.topk(b.diagonal, heads, count, r.n, r.s, b.list, b.listed, count);
    flag_listed(c, b.heads, count, b.list, b.listed, b.diagonal);
  }
};
}  // namespace

LACUNA_PLUGIN(FlexPrefill)
