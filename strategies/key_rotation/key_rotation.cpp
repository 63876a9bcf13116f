// Key rotation (Xiao et al. 2024, "Efficient streaming language models with attention sinks", arXiv 2309.17453, for its
// positions; kvpress KeyRerotationPress for any base)
//
//   keep what the base would keep of the same budget (its forced tokens first, inside the budget)
//   rotate the key at slot i by (i - its position): the cache is contiguous, and later queries follow
//
// The rotation is the core's `positions = compacted`, here the default: what is left is to rank as the base does. It
// evicts when the base does.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct KeyRotation : Strategy {
  struct Params {
    Base base{R"({"name": "streaming_llm"})"};
  } params;

  static void schema(Schema<Params>& s) { s.field("base", &Params::base, "the strategy that ranks the tokens"); }
  static Info info() {
    Info i{};
    i.name = "key_rotation";
    i.summary = "another strategy's eviction, its kept keys rotated to contiguous positions";
    i.paper = "Xiao et al. 2024, arXiv 2309.17453";
    i.rule = "keep the base's best; rotate the key at slot i by i - position";
    i.phases = kEvict;
    i.defaults = R"({"positions": "compacted"})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context&, Plan& p) override { p.per_query_head = 0; }
  void score(Context& c, Scores& s) override { c.base_scores(s); }
};
}  // namespace

LACUNA_PLUGIN(KeyRotation)
