// The true softmax mass as a score: the best that ranking whole units can keep. Clairvoyant; best for mass kept, which
// is not the same as best for output error.
//
//   select: score(unit) = mean over the tile's queries of the dense probability that falls into the unit
//   evict:  score(token) = sum over the queries still to come of its dense probability
//   nothing is forced.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/true_mass.hpp>

namespace {
using namespace lacuna::sdk;

struct OracleTopk : Strategy {
  struct Params {
    std::string unit = "token";
    i32 q_tile = 64;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("unit", &Params::unit, "what is ranked: single tokens, pages of 16 or blocks of 64 (eviction: tokens)",
            "token|page|block")
        .field("q_tile", &Params::q_tile, "prefill queries that share a set", "1..4096");
  }
  static Info info() {
    Info i{};
    i.name = "oracle_topk";
    i.summary = "units ranked by their true softmax mass (clairvoyant)";
    i.paper = "-";
    i.rule = "score(unit) = dense probability in the unit, over the row's queries (eviction: over the queries to come)";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.clairvoyant = 1;
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.q_tile = params.q_tile;
    p.unit_tokens = tokens_of_unit(params.unit);
    // Eviction sums over however many queries follow, so its rows are comparable but do not sum to at most 1.
    p.score_kind = c.call().purpose == Purpose::evict ? ScoreKind::logit : ScoreKind::mass;
  }

  void score(Context& c, Scores& s) override {
    if (c.call().purpose == Purpose::evict)
      c.oracle_mass(s);
    else
      mean_true_mass(c, s);
  }
};
}  // namespace

LACUNA_PLUGIN(OracleTopk)
