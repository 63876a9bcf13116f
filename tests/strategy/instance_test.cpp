#include "lacuna/strategy/instance.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>

#include "expect_error.hpp"
#include "fake_services.hpp"

namespace {
using lacuna::Instance;
using lacuna::Json;
using lacuna::RoleKind;

const lacuna::Registry& registry() {
  static const lacuna::Registry loaded = [] {
    lacuna::Registry out;
    out.load(LACUNA_TEST_PLUGINS "/sample.so");
    out.load(LACUNA_TEST_PLUGINS "/throwing.so");
    return out;
  }();
  return loaded;
}

Instance make(const Json& given, RoleKind role = RoleKind::select) {
  return Instance(lacuna::resolve(registry(), given, "", "", role));
}

/// What the plug-in read of its parameters.
std::string echoed(const Json& given) {
  FakeServices services;
  lacuna::sdk::Plan plan{};
  Instance echo = make(given);
  const std::string prefix = "strategy 'echo', role plan: ";
  const std::string text = error_of([&] { echo.plan(services, plan); });
  REQUIRE(text.substr(0, prefix.size()) == prefix);
  return text.substr(prefix.size());
}
}  // namespace

TEST_CASE("parameters arrive in the plug-in as they were resolved") {
  CHECK(echoed("echo") == "3 5 0.5 false near '' [1,2] {\"2\":[0,1],\"10\":[3]} gqa 2 sinks 0");
  CHECK(echoed({{"name", "echo"},
                {"small", 8},
                {"large", 9007199254740993},
                {"share", 0.1},
                {"flag", true},
                {"way", "far"},
                {"note", "a, b: {c} [d] é"},
                {"list", Json::array()},
                {"classes", {{"12", {5, 0}}, {"3", Json::array()}}},
                {"gqa", "union"},
                {"sinks", 7}}) ==
        "8 9007199254740993 0.1 true far 'a, b: {c} [d] é' [] {\"3\":[],\"12\":[0,5]} gqa 4 sinks 7");
}

TEST_CASE("doubles keep every bit on their way into the plug-in") {
  for (const double value :
       {0.1, 1.0 / 3, 0.30000000000000004, 5e-324, 2.2250738585072014e-308, 1.0, 0.0, std::nextafter(1.0, 0.0)}) {
    const std::string text = echoed({{"name", "echo"}, {"share", value}});
    CAPTURE(text);
    CHECK(std::strtod(text.c_str() + 4, nullptr) == value);
  }
}

TEST_CASE("a plug-in's failures become errors that name strategy and role") {
  FakeServices services;
  lacuna::sdk::Scores scores{};
  lacuna::sdk::Plan plan{};
  expect_error([] { make("throws_in_constructor"); }, {"'throws_in_constructor' could not be made: no luck at birth"});
  Instance exception = make("throws_exception"), number = make("throws_int"), wordy = make("throws_long");
  expect_error([&] { exception.score(services, scores); }, {"strategy 'throws_exception', role score: cannot score"});
  expect_error([&] { exception.plan(services, plan); }, {"strategy 'throws_exception', role plan: no room"});
  expect_error([&] { number.score(services, scores); }, {"strategy 'throws_int', role score", "not a std::exception"});
  CHECK(error_of([&] { wordy.score(services, scores); }).size() < 1200);
  expect_error([&] { number.plan(services, plan); }, {"strategy 'throws_int', role plan", "no such role"});
}

TEST_CASE("a number that the plug-in's type cannot hold is refused, not cut") {
  expect_error([] { make({{"name", "fixed"}, {"tables", 5000000000}}); }, {"'fixed'", "5000000000", "32 bits"});
}

TEST_CASE("an instance moves with its strategy") {
  FakeServices services;
  lacuna::sdk::Scores scores{};
  Instance first = make("both", RoleKind::evict);
  Instance second = std::move(first);
  CHECK(second.has_score());
  CHECK_FALSE(second.has_mark());
  CHECK(second.resolved().type->name() == "both");
  CHECK_NOTHROW(second.score(services, scores));
}
