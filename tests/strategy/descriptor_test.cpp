// A sound descriptor, broken in one place at a time.
#include "strategy/descriptor.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "expect_error.hpp"

namespace {
using namespace lacuna::sdk;

struct Sound : Strategy {
  struct Params {
    i32 n = 3;
  } params;
  static void schema(Schema<Params>& s) {
    s.field("n", &Params::n, "a number", "1..8").require("n", "n is odd", [](const Params& p) { return p.n % 2 == 1; });
  }
  static Info info() {
    Info i{};
    i.name = "sound";
    i.summary = i.paper = i.rule = "-";
    i.phases = kDecode;
    return i;
  }
  void score(Context&, Scores&) override {}
};

/// A copy of the tables that may be damaged.
struct Tables {
  Param p = detail::EntryFor<Sound>::get()->params[0];
  Entry e = *detail::EntryFor<Sound>::get();
  Constraint c = e.constraints[0];
  const Entry* entries[1] = {&e};
  Descriptor d = {kMagic,      kAbiMajor, kAbiMinor, sizeof(Descriptor), sizeof(Entry), kCxxRuntime,
                  kSdkVersion, entries,   1};
  Tables() {
    e.params = &p;
    e.constraints = &c;
  }
  Tables(const Tables&) = delete;
  void check() const {
    lacuna::check_descriptor(d, "x.so");
    lacuna::check_entry(e, "x.so");
  }
};
}  // namespace

TEST_CASE("the sound descriptor passes") { CHECK_NOTHROW(Tables().check()); }

TEST_CASE("a plug-in of the first ABI minor still loads, without what it did not have") {
  Tables t;
  const auto first = static_cast<i32>(offsetof(Entry, constraints));
  t.d.abi_minor = 0;
  t.d.entry_bytes = t.e.bytes = first;
  CHECK_NOTHROW(lacuna::check_descriptor(t.d, "x.so"));
  const Entry whole = lacuna::whole_entry(t.e, 0);
  CHECK(whole.constraints == nullptr);
  CHECK(whole.num_constraints == 0);
  CHECK((whole.check == nullptr));
  CHECK((whole.score == t.e.score));
  CHECK_NOTHROW(lacuna::check_entry(whole, "x.so"));
  t.d.abi_minor = kAbiMinor;
  expect_error([&] { lacuna::check_descriptor(t.d, "x.so"); }, {"other sizes"});
}

TEST_CASE("each fault of a descriptor is named") {
  const struct {
    std::string name;
    std::function<void(Tables&)> damage;
    std::vector<std::string> parts;
  } faults[] = {
      {"magic", [](Tables& t) { t.d.magic = 7; }, {"not a Lacuna plug-in", "magic"}},
      {"older major", [](Tables& t) { t.d.abi_major = 0; }, {"another ABI", fmt::format("ABI 0.{}", kAbiMinor)}},
      {"newer minor",
       [](Tables& t) { t.d.abi_minor = kAbiMinor + 1; },
       {"another ABI", fmt::format("ABI {}.{}", kAbiMajor, kAbiMinor + 1)}},
      {"descriptor size", [](Tables& t) { t.d.bytes += 8; }, {"other sizes", "Descriptor"}},
      {"entry size", [](Tables& t) { t.d.entry_bytes -= 8; }, {"other sizes", "Entry"}},
      {"runtime", [](Tables& t) { t.d.cxx_runtime = "libother"; }, {"C++ runtime", kCxxRuntime, "libother"}},
      {"no runtime", [](Tables& t) { t.d.cxx_runtime = nullptr; }, {"C++ runtime", "none"}},
      {"no entries", [](Tables& t) { t.d.num_entries = 0; }, {"no strategy"}},
      {"null entry", [](Tables& t) { t.entries[0] = nullptr; }, {"strategy 1 of 1", "null"}},
      {"entry's own size", [](Tables& t) { t.e.bytes = 8; }, {"strategy 1 of 1", "another size", "8"}},
      {"null name", [](Tables& t) { t.e.name = nullptr; }, {"strategy 1 of 1", "no usable name", "null"}},
      {"odd name", [](Tables& t) { t.e.name = "Not so!"; }, {"no usable name", "'Not so!'"}},
      {"null text", [](Tables& t) { t.e.rule = nullptr; }, {"'sound'", "null"}},
      {"null create", [](Tables& t) { t.e.create = nullptr; }, {"'sound'", "create or destroy"}},
      {"no role", [](Tables& t) { t.e.score = nullptr; }, {"'sound'", "can do nothing", "no role"}},
      {"no phase", [](Tables& t) { t.e.phases = 0; }, {"'sound'", "can do nothing", "roles score"}},
      {"role of another phase",
       [](Tables& t) {
         t.e.phases = kEvict;
         t.e.mark = [](Strategy*, Services*, const Budget*, Selection*, Error*) { return 0; };
         t.e.score = nullptr;
       },
       {"can do nothing", "roles mark"}},
      {"null parameters", [](Tables& t) { t.e.params = nullptr; }, {"parameter table"}},
      {"null parameter text", [](Tables& t) { t.p.doc = nullptr; }, {"parameter 1", "null"}},
      {"default out of range", [](Tables& t) { t.p.default_value = "9"; }, {"default of 'n'", "1..8", "9"}},
      {"default of another type",
       [](Tables& t) { t.p.default_value = "true"; },
       {"default of 'n'", "whole number", "true"}},
      {"default not JSON", [](Tables& t) { t.p.default_value = "3,"; }, {"default of 'n'", "not valid JSON"}},
      {"bad range", [](Tables& t) { t.p.range = "8..1"; }, {"parameter 'n'", "8..1"}},
      {"range that excludes its only number", [](Tables& t) { t.p.range = "3<..3"; }, {"parameter 'n'", "3<..3"}},
      {"open end without a number", [](Tables& t) { t.p.range = "<..3"; }, {"parameter 'n'", "<..3"}},
      {"null constraint text", [](Tables& t) { t.c.text = nullptr; }, {"constraint 1", "null"}},
      {"null check", [](Tables& t) { t.e.check = nullptr; }, {"constraints are null"}},
      {"constraint on a stranger", [](Tables& t) { t.c.names = "n, m"; }, {"'n is odd' is about 'm'"}},
      {"defaults that break a constraint",
       [](Tables& t) { t.p.default_value = "4"; },
       {"defaults", "n is odd", "n = 4"}},
      {"preset that breaks a constraint",
       [](Tables& t) { t.e.presets = R"({"a": {"n": 2}})"; },
       {"preset 'a'", "n is odd", "n = 2"}},
      {"default of a base that is none",
       [](Tables& t) {
         t.p.name = "base";
         t.p.type = "strategy";
         t.p.range = "";
         t.e.wrapper = 1;
         t.e.num_constraints = 0;
       },
       {"default of 'base'", "a role table"}},
      {"unknown type", [](Tables& t) { t.p.type = "colour"; }, {"parameter 'n'", "colour"}},
      {"strategy outside a wrapper",
       [](Tables& t) {
         t.p.type = "strategy";
         t.p.range = "";
       },
       {"parameter 'n'", "wrapper"}},
      {"reserved name", [](Tables& t) { t.p.name = "gqa"; }, {"'gqa'", "core's own"}},
      {"odd parameter name", [](Tables& t) { t.p.name = "N"; }, {"parameter's name", "'N'"}},
      {"defaults not JSON", [](Tables& t) { t.e.defaults = "{"; }, {"defaults", "not valid JSON"}},
      {"defaults no object", [](Tables& t) { t.e.defaults = "[1]"; }, {"defaults", "object"}},
      {"defaults of a stranger",
       [](Tables& t) { t.e.defaults = R"({"gqas": "mean"})"; },
       {"defaults", "'gqas'", "'gqa'"}},
      {"defaults of an own one", [](Tables& t) { t.e.defaults = R"({"n": 4})"; }, {"defaults", "'n'", "shared"}},
      {"defaults out of range",
       [](Tables& t) { t.e.defaults = R"({"gqa": "median"})"; },
       {"defaults", "median", "mean"}},
      {"preset no object", [](Tables& t) { t.e.presets = R"({"a": 3})"; }, {"preset 'a'", "object"}},
      {"preset of a stranger", [](Tables& t) { t.e.presets = R"({"a": {"m": 3}})"; }, {"preset 'a'", "'m'"}},
      {"preset out of range", [](Tables& t) { t.e.presets = R"({"a": {"n": 99}})"; }, {"preset 'a'", "99", "1..8"}},
      {"dense point out of range", [](Tables& t) { t.e.dense_point = R"({"density": 1.5})"; }, {"dense_point", "1.5"}},
      {"dense point of a stranger", [](Tables& t) { t.e.dense_point = R"({"m": 1})"; }, {"dense_point", "'m'"}},
      {"dense point with two budgets",
       [](Tables& t) { t.e.dense_point = R"({"density": 1, "tokens": 5})"; },
       {"dense_point", "two budgets"}},
  };
  for (const auto& fault : faults) {
    CAPTURE(fault.name);
    Tables tables;
    fault.damage(tables);
    const std::string text = error_of([&] { tables.check(); });
    CAPTURE(text);
    CHECK(text.find("x.so") != std::string::npos);
    for (const std::string& part : fault.parts) {
      CAPTURE(part);
      CHECK(text.find(part) != std::string::npos);
    }
  }
}
