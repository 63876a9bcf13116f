#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "expect_error.hpp"
#include "lacuna/strategy/instance.hpp"
#include "scratch_directory.hpp"

namespace {
using lacuna::BudgetSpec;
using lacuna::Json;
using lacuna::Resolved;
using lacuna::RoleKind;

constexpr RoleKind kSelect = RoleKind::select, kEvict = RoleKind::evict, kAllocate = RoleKind::allocate;

const lacuna::Registry& registry() {
  static const lacuna::Registry loaded = [] {
    lacuna::Registry out;
    out.load(LACUNA_TEST_PLUGINS "/sample.so");
    return out;
  }();
  return loaded;
}

Resolved resolved(const Json& given, RoleKind role, const std::string& directory = "") {
  return lacuna::resolve(registry(), given, "study.toml:3:1", directory, role);
}
}  // namespace

TEST_CASE("what a table resolves to") {
  const struct {
    std::string given;
    RoleKind role;
    std::string described;
  } cases[] = {
      {R"("both")", kSelect, R"({"name":"both","sinks":4,"gqa":"none","dense_layers":[],"recent":0})"},
      {R"("both")", kEvict,
       R"({"name":"both","sinks":4,"gqa":"mean","dense_layers":[],"recent":0,"cut":"end","positions":"original"})"},
      {R"({"name":"both","cut":512,"gqa":"union","positions":"compacted","density":0.1})", kEvict,
       R"({"name":"both","sinks":4,"gqa":"union","dense_layers":[],"recent":0,"cut":512,"positions":"compacted","density":0.1})"},
      {R"({"name":"both","preset":"late"})", kEvict,
       R"({"name":"both","sinks":4,"gqa":"mean","dense_layers":[],"recent":8,"cut":"before_question","positions":"original"})"},
      {R"({"name":"both","preset":"late"})", kSelect,
       R"({"name":"both","sinks":4,"gqa":"none","dense_layers":[],"recent":8})"},
      {R"({"name":"both","dense_layers":[3,1,3],"tokens":64})", kSelect,
       R"({"name":"both","sinks":4,"gqa":"none","dense_layers":[1,3],"recent":0,"tokens":64})"},
      {R"({"name":"echo","preset":"wide","small":2,"list":[],"classes":{}})", kSelect,
       R"({"name":"echo","small":2,"large":5,"share":1.0,"flag":false,"way":"near","note":"","list":[],"classes":{},)"
       R"("gqa":"max","dense_layers":[],"sinks":0,"recent":0})"},
      {R"({"name":"echo","share":0,"classes":{"layer":{"12":{"full":[3,0,3]},"2":{"full":[]}}},"density":1,"shape":"proportional"})",
       kSelect,
       R"({"name":"echo","small":3,"large":5,"share":0.0,"flag":false,"way":"near","note":"","list":[1,2],)"
       R"("classes":{"2":[],"12":[0,3]},"gqa":"max","dense_layers":[0,1],"sinks":0,"recent":0,"density":1.0,"shape":"proportional"})"},
      {R"({"name":"wrap","base":"both"})", kSelect,
       R"({"name":"wrap","top_p":0.85,"gqa":"none","dense_layers":[],"sinks":0,"recent":0,)"
       R"("base":{"name":"both","sinks":4,"gqa":"none","recent":0}})"},
      {R"({"name":"wrap","mass":0.5,"base":{"name":"echo","preset":"wide","units":3}})", kSelect,
       R"({"name":"wrap","top_p":0.85,"gqa":"none","dense_layers":[],"sinks":0,"recent":0,"mass":0.5,)"
       R"("base":{"name":"echo","small":8,"large":5,"share":1.0,"flag":false,"way":"near","note":"","list":[1,2],)"
       R"("classes":{"2":[0,1],"10":[3]},"gqa":"max","sinks":0,"recent":0,"units":3}})"},
      {R"({"name":"wrap_both","mass":0.5})", kSelect,
       R"({"name":"wrap_both","gqa":"none","dense_layers":[],"sinks":0,"recent":0,"mass":0.5,)"
       R"("base":{"name":"both","sinks":4,"gqa":"none","recent":0,"density":0.25}})"},
      {R"({"name":"wrap_both","base":"both"})", kSelect,
       R"({"name":"wrap_both","gqa":"none","dense_layers":[],"sinks":0,"recent":0,)"
       R"("base":{"name":"both","sinks":4,"gqa":"none","recent":0}})"},
      {R"({"name":"paired","block":6,"stride":2,"share":1})", kSelect,
       R"({"name":"paired","block":6,"stride":2,"share":1.0,"least":1.0,"gqa":"none","dense_layers":[],"sinks":0,"recent":0})"},
      {R"({"name":"fixed","tables":7})", kSelect,
       R"({"name":"fixed","tables":7,"gqa":"none","dense_layers":[],"sinks":0,"recent":0})"},
      {R"("share")", kAllocate, R"({"name":"share"})"},
  };
  for (const auto& c : cases) {
    CAPTURE(c.given);
    const Json described = resolved(Json::parse(c.given), c.role).describe();
    CHECK(described.dump() == c.described);
    CHECK(resolved(described, c.role).describe().dump() == c.described);  // canonical: it resolves to itself
  }
}

TEST_CASE("what is refused, and what is said") {
  const struct {
    std::string given;
    RoleKind role;
    std::vector<std::string> parts;
  } cases[] = {
      {"7", kSelect, {"a table with a name", "7"}},
      {R"({"small":3})", kSelect, {"a table with a name"}},
      {R"("ecco")", kSelect, {"unknown strategy 'ecco'", "'echo'"}},
      {R"("keeper")", kSelect, {"'keeper' cannot select", "both, echo, fixed, paired, wrap", "evict"}},
      {R"("fixed")", kEvict, {"'fixed' cannot evict", "both, keeper"}},
      {R"("both")", kAllocate, {"'both' cannot allocate", "share"}},
      {R"({"name":"echo","smal":3})", kSelect, {"'echo'", "unknown parameter 'smal'", "'small'"}},
      {R"({"name":"echo","densty":0.3})", kSelect, {"unknown parameter 'densty'", "'density'"}},
      {R"({"name":"echo","small":9})", kSelect, {"'small'", "a small number", "1..8", "9"}},
      {R"({"name":"echo","small":2.0})", kSelect, {"'small'", "whole number", "2.0"}},
      {R"({"name":"echo","small":"3"})", kSelect, {"'small'", "whole number", "\"3\""}},
      {R"({"name":"echo","small":[1,2]})", kSelect, {"'small'", "whole number", "[1,2]"}},
      {R"({"name":"echo","large":18446744073709551615})", kSelect, {"'large'", "18446744073709551615"}},
      {R"({"name":"echo","share":"much"})", kSelect, {"'share'", "a number in 0..1"}},
      {R"({"name":"echo","flag":1})", kSelect, {"'flag'", "true or false", "1"}},
      {R"({"name":"echo","way":"fat"})", kSelect, {"'way'", "near|far", "\"fat\"", "'far'"}},
      {R"({"name":"echo","note":"say \"hi\""})", kSelect, {"'note'", "without quotes"}},
      {R"({"name":"echo","list":[1,100]})", kSelect, {"'list'", "0..99", "100"}},
      {R"({"name":"echo","list":3})", kSelect, {"'list'", "a list of whole numbers"}},
      {R"({"name":"echo","classes":{"layer":{"x":{"full":[0]}}}})", kSelect, {"'classes'", "[layer.3]", "'x'"}},
      {R"({"name":"echo","classes":{"layer":{"3":{"fool":[0]}}}})", kSelect, {"'classes'", "full", "fool"}},
      {R"({"name":"echo","classes":{"layer":{"3":{"full":[-1]}}}})", kSelect, {"'classes'", "layer 3", "-1"}},
      {R"({"name":"echo","classes":{"layer":{},"lawyer":{}}})", kSelect, {"'classes'", "lawyer"}},
      {R"({"name":"echo","classes":{"3":[0],"03":[1]}})", kSelect, {"'classes'", "layer 3 twice"}},
      {R"({"name":"echo","classes":"nowhere.toml"})", kSelect, {"'classes'", "no file", "nowhere.toml"}},
      {R"({"name":"echo","preset":"wid"})", kSelect, {"unknown preset", "far, wide", "\"wid\"", "'wide'"}},
      {R"({"name":"keeper","preset":"wild"})", kEvict, {"no presets"}},
      {R"({"name":"echo","density":0})", kSelect, {"'density'", "(0, 1]", "0"}},
      {R"({"name":"echo","density":1.01})", kSelect, {"'density'", "1.01"}},
      {R"({"name":"echo","tokens":0})", kSelect, {"'tokens'", "a whole number >= 1"}},
      {R"({"name":"echo","units":2.5})", kSelect, {"'units'", "whole number"}},
      {R"({"name":"echo","mass":0})", kSelect, {"'mass'", "(0, 1]"}},
      {R"({"name":"echo","density":0.1,"tokens":64})", kSelect, {"two budgets", "density and tokens"}},
      {R"({"name":"echo","tokens":64,"shape":"constant"})", kSelect, {"'shape' without a density", "tokens"}},
      {R"({"name":"echo","density":0.1,"shape":"flat"})", kSelect, {"'shape'", "constant|proportional"}},
      {R"({"name":"both","density":0.1,"shape":"constant"})", kSelect, {"'shape' does not apply", "prefill"}},
      {R"({"name":"fixed","density":0.1})", kSelect, {"'density' does not apply", "no budget", "tables"}},
      {R"({"name":"share","density":0.1})", kAllocate, {"'density' does not apply", "allocator"}},
      {R"({"name":"share","gqa":"mean"})", kAllocate, {"unknown parameter 'gqa'"}},
      {R"({"name":"echo","large":-1})", kSelect, {"'large'", "a whole number >= 0", "-1"}},
      {R"({"name":"paired","share":0})", kSelect, {"'share'", "a number in (0, 1]", "0"}},
      {R"({"name":"paired","least":0})", kSelect, {"'least'", "a number > 0", "0"}},
      {R"({"name":"paired","block":10})",
       kSelect,
       {"'paired'", "block is a multiple of stride", "block = 10, stride = 4"}},
      {R"({"name":"paired","preset":"wide","stride":5})", kSelect, {"block = 12, stride = 5"}},
      {R"({"name":"paired","block":9,"stride":3})", kSelect, {"stride is even", "found stride = 3"}},
      {R"({"name":"both","gqa":"none"})",
       kEvict,
       {"gqa = none in eviction", "mean|max|sum|union", "Pages belong to KV heads"}},
      {R"({"name":"both","gqa":"median"})", kSelect, {"'gqa'", "none|mean|max|sum|union", "median"}},
      {R"({"name":"both","cut":"end"})", kSelect, {"'cut' does not apply", "eviction"}},
      {R"({"name":"both","cut":0})", kEvict, {"'cut'", "before_question", "0"}},
      {R"({"name":"both","cut":"middle"})", kEvict, {"'cut'", "before_question", "middle"}},
      {R"({"name":"both","positions":"new"})", kEvict, {"'positions'", "original|compacted"}},
      {R"({"name":"both","dense_layers":[-1]})", kSelect, {"'dense_layers'", "-1"}},
      {R"({"name":"both","dense_layers":1})", kSelect, {"'dense_layers'", "list"}},
      {R"({"name":"both","recent":4294967296})", kSelect, {"'recent'", "4294967296"}},
      {R"({"name":"both","base":"echo"})", kSelect, {"'base' does not apply", "Only wrappers"}},
      {R"("wrap")", kSelect, {"'wrap' is a wrapper", "base"}},
      {R"({"name":"wrap","base":"keeper"})", kSelect, {"'keeper' cannot select", "study.toml:3:1, base"}},
      {R"({"name":"wrap","base":{"name":"both","dense_layers":[0]}})",
       kSelect,
       {"'dense_layers' does not apply", "wrapper's table"}},
      {R"({"name":"wrap","base":{"name":"both","sinks":-1}})", kSelect, {"'both'", "'sinks'", "-1"}},
  };
  for (const auto& c : cases) {
    CAPTURE(c.given);
    const std::string text = error_of([&] { resolved(Json::parse(c.given), c.role); });
    CAPTURE(text);
    CHECK(text.find("study.toml:3:1") != std::string::npos);
    for (const std::string& part : c.parts) {
      CAPTURE(part);
      CHECK(text.find(part) != std::string::npos);
    }
  }
  expect_error([] { resolved({{"name", "echo"}, {"share", std::nan("")}}, kSelect); }, {"'share'", "not finite"});
}

TEST_CASE("what the core reads of a resolved strategy") {
  const Resolved both =
      resolved({{"name", "both"}, {"gqa", "union"}, {"recent", 9}, {"dense_layers", {2, 0}}, {"tokens", 64}}, kSelect);
  CHECK(both.common().gqa == lacuna::sdk::Gqa::union_);
  CHECK(both.common().recent == 9);
  CHECK(both.common().sinks == 0);  // its own `sinks` is its own business
  CHECK(both.dense_layers() == std::vector<int>{0, 2});
  CHECK(both.budget.kind == BudgetSpec::Kind::tokens);
  CHECK(both.budget.value == 64);
  const Resolved echo = resolved({{"name", "echo"}, {"shape", "proportional"}}, kSelect);
  CHECK(echo.budget.kind == BudgetSpec::Kind::none);
  CHECK(echo.budget.proportional);
  const Resolved share = resolved("share", kAllocate);
  CHECK(share.common().gqa == lacuna::sdk::Gqa::none);
  CHECK(share.dense_layers().empty());
  CHECK(resolved({{"name", "wrap"}, {"base", "both"}}, kSelect).base->type->name() == "both");
}

TEST_CASE("class tables from a TOML file") {
  const lacuna::testing::ScratchDirectory directory;
  const auto given = [&](const std::string& text) {
    lacuna::testing::write_bytes(directory.file("heads.toml"), text);
    return resolved({{"name", "echo"}, {"classes", "heads.toml"}}, kSelect, directory.path()).own["classes"].dump();
  };
  CHECK(given("[layer.10]\nfull = [1]\n[layer.3]\nfull = [2, 0]\n") == R"({"3":[0,2],"10":[1]})");
  CHECK(given("[layer]\n3 = { full = [] }\n") == R"({"3":[]})");
  expect_error([&] { given("[layer.3]\nfull = [2, \n"); }, {"not TOML", "heads.toml:"});
  expect_error([&] { given("[layer.3]\nfull = [0.5]\n"); }, {"'classes'", "layer 3", "heads.toml"});
  expect_error([&] { given("[layer.3]\nfool = [0]\n"); }, {"full", "fool", "heads.toml"});
  expect_error([&] { given("[layers.3]\nfull = [0]\n"); }, {"[layer.N]", "heads.toml"});
}
