// XAttention (Xu et al. 2025, "XAttention: block sparse attention with antidiagonal scoring", arXiv 2503.16428)
//
//   in groups of `stride` tokens, the reversed queries of group i against the keys of group j:
//     e(i, j) = sum of q . k over the group pair's antidiagonal / (sqrt(d) * stride),   j <= i
//   p = softmax of every group row;  score(tile, block) = sum of p over the pair's (block / stride)^2 cells
//   block 0 and the diagonal are forced and their mass counts first; then blocks in descending order while the mass
//   before them is below `threshold` of the row (the crossing block included). A budget ranks the same scores instead.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct XAttention : Strategy {
  struct Params {
    i32 block = 128, stride = 16;
    double threshold = 0.9;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("block", &Params::block, "queries of a tile and tokens of a key block", "1..4096")
        .field("stride", &Params::stride, "tokens of a group; the estimate costs 1 / stride of the logits", "1..4096")
        .knob("threshold", &Params::threshold, "share of the estimated mass that the blocks must hold", "0..1")
        .require("block, stride", "block is a multiple of stride",
                 [](const Params& p) { return p.block % p.stride == 0; });
  }
  static Info info() {
    Info i{};
    i.name = "xattention";
    i.summary = "blocks that hold a share of the mass estimated on antidiagonals";
    i.paper = "Xu et al. 2025, arXiv 2503.16428";
    i.rule =
        "score = antidiagonal estimate of the block's mass; block 0 and diagonal forced, then top-p at `threshold`";
    i.phases = kPrefill;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.q_tile = p.unit_tokens = params.block;
    p.first_units = p.last_units = 1;
    p.threshold = params.threshold;
    p.score_kind = ScoreKind::mass;
  }

  void score(Context& c, Scores& s) override { c.antidiagonal_mass(c.current_queries(), params.stride, s); }
};
}  // namespace

LACUNA_PLUGIN(XAttention)
