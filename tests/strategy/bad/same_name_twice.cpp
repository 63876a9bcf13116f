#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

template <int>
struct Same : Strategy {
  static Info info() {
    Info i{};
    i.name = "same";
    i.summary = i.paper = i.rule = "-";
    i.phases = kDecode;
    return i;
  }
  void score(Context&, Scores&) override {}
};
}  // namespace

LACUNA_PLUGIN(Same<1>, Same<2>)
