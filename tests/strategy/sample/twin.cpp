// Built twice, with different build ids: equal code, equal id, equal name.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Twin : Strategy {
  static Info info() {
    Info i{};
    i.name = "twin";
    i.summary = i.paper = i.rule = "-";
    i.phases = kDecode;
    return i;
  }
  void score(Context&, Scores&) override {}
};
}  // namespace

LACUNA_PLUGIN(Twin)
