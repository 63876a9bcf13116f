#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Unready : Strategy {
  static Info info() { throw std::runtime_error("not ready"); }
  void score(Context&, Scores&) override {}
};
}  // namespace

LACUNA_PLUGIN(Unready)
