// Block top-k (Jiang et al. 2024, "MInference 1.0", arXiv 2407.02490: the block-sparse pattern)
//
//   Q[t] = mean of the queries of tile t,  K[b] = mean of the keys of block b    (a partial tail is padded with zeros)
//   score(t, b) = Q[t] . K[b]                                                   (unscaled, per query head)
//   every tile reads its `top` best visible blocks; nothing is forced.
// Preset sparse_frontier (Nawrot et al. 2025): 16-token tiles and blocks; the first block, the diagonal and the one
// before it are forced, inside the count.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct BlockTopk : Strategy {
  struct Params {
    i32 block = 64, q_tile = 64;
    i32 sink_blocks = 0, local_blocks = 0;
    i64 top = 100;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("block", &Params::block, "tokens of a key block", "1..4096")
        .field("q_tile", &Params::q_tile, "queries of a tile", "1..4096")
        .field("sink_blocks", &Params::sink_blocks, "first blocks that are always read", "0..")
        .field("local_blocks", &Params::local_blocks, "blocks read up to the diagonal, it included", "0..")
        .field("top", &Params::top, "blocks of a tile when no budget is given, forced ones included", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "block_topk";
    i.summary = "blocks ranked by mean query times mean key";
    i.paper = "Jiang et al. 2024, arXiv 2407.02490";
    i.rule = "score(tile, block) = mean query of the tile . mean key of the block; the best `top` visible blocks";
    i.phases = kPrefill;
    i.presets =
        R"({"original": {}, "sparse_frontier": {"block": 16, "q_tile": 16, "sink_blocks": 1, "local_blocks": 2, "top": 64}})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.q_tile = params.q_tile;
    p.unit_tokens = params.block;
    p.first_units = params.sink_blocks;
    p.last_units = params.local_blocks;
    p.default_units = params.top;
    p.score_kind = ScoreKind::rank;
    const Layer& l = c.layer();
    const i64 means =
        l.num_qo_heads * ceil_div(p.max_cached, params.q_tile) + l.num_kv_heads * ceil_div(p.max_cached, params.block);
    p.workspace_bytes = 4 * c.call().num_seqs * means * l.head_dim + 2 * 256;
  }

  void score(Context& c, Scores& s) override {
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 kv_heads = c.layer().num_kv_heads;
    const i64 d = q.head_dim, block = params.block, units = s.units, stride = s.stride;
    const i64 tiles = ceil_div(q.count, params.q_tile), blocks = ceil_div(kv.max_length, block);
    float* queries = c.workspace<float>(q.seqs * q.heads * tiles * d);
    float* keys = c.workspace<float>(kv.rows * blocks * d);
    c.mean_queries(q, params.q_tile, true, queries);
    c.mean_keys(params.block, true, keys);
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units;
      if (unit >= blocks || unit * block >= rows.first_position + rows.query_end(row)) return;
      const i64 head = static_cast<i64>(rows.seq_of(row)) * rows.heads + rows.head_of(row);
      const float *a = queries + (head * tiles + rows.tile_of(row)) * d,
                  *b = keys + (rows.kv_row(row, kv_heads) * blocks + unit) * d;
      float sum = 0.f;
      for (i64 e = 0; e < d; ++e) sum += a[e] * b[e];
      value[row * stride + unit] = sum;
    });
    const double pairs = 0.5 * static_cast<double>(rows.count()) * static_cast<double>(units);
    c.charge(4.0 * d * (rows.count() + kv.rows * blocks) + 4.0 * pairs, 2.0 * d * pairs);
  }

 private:
  static i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
};
}  // namespace

LACUNA_PLUGIN(BlockTopk)
