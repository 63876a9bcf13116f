// The smallest set that holds a share of the true softmax mass: what any top-p method aims at. Clairvoyant.
//
//   score(unit) = mean over the tile's queries of the dense probability that falls into the unit
//   every row reads its best units until their mass reaches p of the row's (the crossing unit included)
//   nothing is forced. A budget ranks the same scores instead, which is oracle_topk.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/true_mass.hpp>

namespace {
using namespace lacuna::sdk;

struct OracleTopp : Strategy {
  struct Params {
    std::string unit = "token";
    i32 q_tile = 64;
    double p = 0.95;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("unit", &Params::unit, "what is taken: single tokens, pages of 16 or blocks of 64", "token|page|block")
        .field("q_tile", &Params::q_tile, "prefill queries that share a set", "1..4096")
        .knob("p", &Params::p, "share of the true mass that a set must hold", "0..1");
  }
  static Info info() {
    Info i{};
    i.name = "oracle_topp";
    i.summary = "the smallest sets that hold a share of the true softmax mass (clairvoyant)";
    i.paper = "-";
    i.rule = "score(unit) = dense probability in the unit, over the row's queries; top-p at `p`";
    i.phases = kPrefill | kDecode;
    i.dense_point = R"({"density": 1.0})";
    i.clairvoyant = 1;
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.q_tile = params.q_tile;
    p.unit_tokens = tokens_of_unit(params.unit);
    p.score_kind = ScoreKind::mass;
    p.threshold = params.p;
  }

  void score(Context& c, Scores& s) override { mean_true_mass(c, s); }
};
}  // namespace

LACUNA_PLUGIN(OracleTopp)
