#include "study/scenario_file.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {
const char* const kStudy =
    "budget.density = 0.2\n"
    "[[strategy]]\nselect = { name = \"twilight\", base = \"quest\" }\n"
    "[[strategy]]\nselect = { name = \"quest\", page_size = 16 }\n"
    "[[strategy]]\nevict = \"snapkv\"\n";

Scenario with(const std::vector<std::string>& set) {
  Overrides o;
  o.set = set;
  return parse(kStudy, o);
}
std::string error_with(const std::vector<std::string>& set) {
  Overrides o;
  o.set = set;
  return parse_error(kStudy, o);
}
}  // namespace

TEST_CASE("--set") {
  SUBCASE("role.key reaches every strategy that has it") {
    const Scenario s = with({"select.gqa=sum"});
    CHECK(s.cells.at(0).select->shared["gqa"] == "sum");
    CHECK(s.cells.at(1).select->shared["gqa"] == "sum");
  }
  SUBCASE("role.base.key") {
    const Scenario s = with({"select.base.page_size=64"});
    CHECK(s.cells.at(0).select->base->own["page_size"] == 64);
    CHECK(s.cells.at(1).select->own["page_size"] == 16);
  }
  SUBCASE("a base by name comes first, wherever it stands on the command line") {
    const Scenario s = with({"select.base.unit=page", "select.base.name=oracle_topk"});
    CHECK(s.cells.at(0).select->base->own["unit"] == "page");
  }
  SUBCASE("role.base.key of a base that is the default") {
    Overrides o;
    o.set = {"select.base.page_size=64"};
    const Scenario s = parse("[[strategy]]\nselect = \"twilight\"", o);
    CHECK(s.cells.at(0).select->base->own["page_size"] == 64);
    CHECK(s.cells.at(0).select->base->budget.value == 0.25);
  }
  SUBCASE("a place inside a class table") {
    Overrides o;
    o.set = {"allocate.classes.layer.3.full=[0, 2]", "allocate.classes.layer.5.full=[]"};
    const std::string study = "[[strategy]]\nselect = \"quest\"\nallocate = ";
    const Scenario s = parse(study + "\"duo\"", o);
    CHECK(s.cells.at(0).allocate->own["classes"].dump() == R"({"3":[0,2],"5":[]})");
    const Scenario added = parse(study + "{ name = \"duo\", classes.layer.5.full = [1] }", o);
    CHECK(added.cells.at(0).allocate->own["classes"].dump() == R"({"3":[0,2],"5":[]})");
    const std::string file = parse_error(study + "{ name = \"duo\", classes = \"heads.toml\" }", o);
    CHECK(file.find("'classes' is a file") != std::string::npos);
    CHECK(file.find("--set 'allocate.classes={layer.3.full=[0, 2]}'") != std::string::npos);
    o.set = {"allocate.classes={layer.3.full=[0, 2]}"};
    CHECK(parse(study + "\"duo\"", o).cells.at(0).allocate->own["classes"].dump() == R"({"3":[0,2]})");
    o.set = {"allocate.sinks.layer.3=1"};
    CHECK(parse_error(study + "\"duo\"", o).find("changes nothing") != std::string::npos);
  }
  SUBCASE("a bare key of one role") {
    const Scenario s = with({"window=16"});
    CHECK(s.cells.at(2).evict->own["window"] == 16);
  }
  SUBCASE("an axis") { CHECK(with({"page_size=[8, 16]"}).cells.size() == 4); }
  SUBCASE("a bare key of two roles is refused") {
    const std::string text = error_with({"gqa=sum"});
    CHECK(text.find("evict and select") != std::string::npos);
    CHECK(text.find("evict.gqa=sum") != std::string::npos);
  }
  SUBCASE("what changes nothing is refused") {
    for (const char* set : {"select.colour=red", "colour=red", "allocate.floor=0.1", "evict.base.window=3"})
      CHECK(error_with({set}).find("changes nothing") != std::string::npos);
  }
  SUBCASE("not a setting") {
    CHECK(error_with({"window"}).find("role.key=value") != std::string::npos);
    CHECK(error_with({"=3"}).find("role.key=value") != std::string::npos);
    CHECK(error_with({"selct.window=3"}).find("did you mean 'select'") != std::string::npos);
    CHECK(error_with({"window=x"}).find("window") != std::string::npos);
  }
}

TEST_CASE("the command line wins over [run] and [budget]") {
  Overrides o;
  o.density = {0.3, 0.4};
  o.seed = {7};
  o.device = "cpu";
  o.check = true;
  const Scenario s =
      parse("budget.tokens = 8\nrun = { seed = 1, device = \"cuda\" }\n[[strategy]]\nselect = \"quest\"", o);
  REQUIRE(s.cells.size() == 2);
  CHECK(s.cells[1].select->budget.value == 0.4);
  CHECK(s.cells[0].seed == 7);
  CHECK(s.options.check);
  o.density = {0};
  CHECK(parse_error("[[strategy]]\nselect = \"quest\"", o).find("command line") != std::string::npos);
}

TEST_CASE("role tables of `dump`") {
  const Registry& registry = built_ins();
  Json roles = {{"select", {{"name", "twilight"}}}};
  apply_settings(registry, roles, {"select.base.density=0.25", "top_p=0.9", "select.base.name=quest"});
  const Cell cell = make_cell(registry, roles, 3, "command line", "");
  CHECK(cell.select->base->type->name() == "quest");
  CHECK(cell.select->base->budget.value == 0.25);
  CHECK(cell.select->own["top_p"] == 0.9);
  CHECK(cell.seed == 3);
  CHECK_THROWS_AS(apply_settings(registry, roles, {"select.colour=1"}), Error);
}
