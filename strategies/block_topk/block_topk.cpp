// Block top-k (Jiang et al. 2024, "MInference 1.0", arXiv 2407.02490: the block-sparse pattern)
//
//   Q[t] = mean of the queries of tile t,  K[b] = mean of the keys of block b    (a partial tail is padded with zeros)
//   score(t, b) = Q[t] . K[b]                                                   (unscaled, per query head)
//   every tile reads its `top` best visible blocks; nothing is forced.
// Preset sparse_frontier (Nawrot et al. 2025): 16-token tiles and blocks; the first block, the diagonal and the one
// before it are forced, inside the count.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/pooled.hpp>

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
    p.workspace_bytes = pooled_dots_bytes(c, p.max_cached, params.q_tile, params.block);
  }

  void score(Context& c, Scores& s) override { pooled_dots(c, s.rows, params.block, s.value, s.stride); }
};
}  // namespace

LACUNA_PLUGIN(BlockTopk)
