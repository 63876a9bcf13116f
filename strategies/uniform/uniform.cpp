// Uniform budgets: every layer, head and tile has the same target. The baseline of every other allocator.
//
//   target(layer, row) = the target that the budget gives
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Uniform : Strategy {
  static Info info() {
    Info i{};
    i.name = "uniform";
    i.summary = "the same budget for every layer, head and tile";
    i.paper = "-";
    i.rule = "target(layer, row) = the given target";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void allocate_rows(Context&, const Scores*, Budget&) override {}
};
}  // namespace

LACUNA_PLUGIN(Uniform)
