// Strategies that load and then throw.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

Info named(const char* name) {
  Info i{};
  i.name = name;
  i.summary = i.paper = i.rule = "-";
  i.phases = kDecode;
  return i;
}

struct InConstructor : Strategy {
  InConstructor() { throw std::runtime_error("no luck at birth"); }
  static Info info() { return named("throws_in_constructor"); }
  void score(Context&, Scores&) override {}
};
struct InRole : Strategy {
  static Info info() { return named("throws_exception"); }
  void plan(Context&, Plan&) override { throw std::out_of_range("no room"); }
  void score(Context&, Scores&) override { throw Failure("cannot score"); }
};
struct AnInt : Strategy {
  static Info info() { return named("throws_int"); }
  void score(Context&, Scores&) override { throw 7; }
};
struct TooLong : Strategy {
  static Info info() { return named("throws_long"); }
  void score(Context&, Scores&) override { throw Failure(std::string(5000, 'x')); }
};
}  // namespace

LACUNA_PLUGIN(InConstructor, InRole, AnInt, TooLong)
