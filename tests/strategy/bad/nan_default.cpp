#include <lacuna/sdk.hpp>
#include <limits>

namespace {
using namespace lacuna::sdk;

struct NanDefault : Strategy {
  struct Params {
    double share = std::numeric_limits<double>::quiet_NaN();
  } params;
  static void schema(Schema<Params>& s) { s.field("share", &Params::share, "a share", "0..1"); }
  static Info info() {
    Info i{};
    i.name = "nan_default";
    i.summary = i.paper = i.rule = "-";
    i.phases = kDecode;
    return i;
  }
  void score(Context&, Scores&) override {}
};
}  // namespace

LACUNA_PLUGIN(NanDefault)
