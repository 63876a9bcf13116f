#include "study/scenario_file.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {
using Labels = std::vector<std::string>;

Json role(const Scenario& s, std::size_t cell, const char* name) { return s.cells.at(cell).describe().at(name); }

std::vector<double> densities(const Scenario& s) {
  std::vector<double> out;
  for (const Cell& c : s.cells)
    out.push_back(c.select->budget.kind == BudgetSpec::Kind::density ? c.select->budget.value : -1);
  return out;
}
}  // namespace

TEST_CASE("a name is short for a table") {
  const Scenario s = parse("[[strategy]]\nselect = \"quest\"\n[[strategy]]\nselect = { name = \"quest\" }");
  CHECK(labels_of(s) == Labels{"quest"});  // equal cells are one
  CHECK(s.name == "s");
  CHECK(s.device == "cpu");
  CHECK(s.options.phases.size() == 3);
}

TEST_CASE("traces are found beside the scenario") {
  const ScenarioFile file(
      "trace.files = [\"a/../t.safetensors\", \"/abs/u.safetensors\"]\n[[strategy]]\nselect = \"quest\"");
  const Scenario s = load_scenario(file.path(), built_ins(), {});
  CHECK(s.traces == Labels{file.directory() + "/t.safetensors", "/abs/u.safetensors"});
}

TEST_CASE("a value is an axis if it is one level deeper than its type") {
  SUBCASE("numbers") {
    const Scenario s =
        parse("[[strategy]]\nselect = { name = \"quest\", page_size = [16, 32], gqa = [\"none\", \"sum\"] }");
    CHECK(labels_of(s) == Labels{"quest(gqa=none, page_size=16)", "quest(gqa=none, page_size=32)",
                                 "quest(gqa=sum, page_size=16)", "quest(gqa=sum, page_size=32)"});
  }
  SUBCASE("a list of a list type is a value") {
    const Scenario s = parse("[[strategy]]\nselect = { name = \"quest\", dense_layers = [0, 3] }");
    REQUIRE(s.cells.size() == 1);
    CHECK(s.cells[0].select->dense_layers() == std::vector<int>{0, 3});
    CHECK(s.cells[0].label == "quest");
  }
  SUBCASE("a list of lists is two points, which the label tells apart") {
    const Scenario s = parse("[[strategy]]\nselect = { name = \"quest\", dense_layers = [[], [0, 1]] }");
    CHECK(labels_of(s) == Labels{"quest(dense_layers=[])", "quest(dense_layers=[0,1])"});
  }
  SUBCASE("strategies") {
    const Scenario s = parse("[[strategy]]\nselect = [\"quest\", { name = \"random\" }]");
    CHECK(labels_of(s) == Labels{"quest", "random"});
  }
  SUBCASE("inside a base, and bases") {
    const Scenario s = parse(
        "[[strategy]]\nselect = { name = \"twilight\", base = [{ name = \"quest\", page_size = [8, 16] }, \"dense\"] "
        "}");
    CHECK(labels_of(s) ==
          Labels{"twilight(base=quest(page_size=8))", "twilight(base=quest(page_size=16))", "twilight(base=dense)"});
  }
  SUBCASE("a name of the scenario's own keeps what varies") {
    const Scenario s = parse("[[strategy]]\nlabel = \"Q\"\nselect = { name = \"quest\", page_size = [16, 32] }");
    CHECK(labels_of(s) == Labels{"Q(select.page_size=16)", "Q(select.page_size=32)"});
  }
}

TEST_CASE("budgets") {
  const std::string budget = "[budget]\ndensity = [0.1, 0.2]\n";
  SUBCASE("the default reaches roles without one") {
    CHECK(densities(parse(budget + "[[strategy]]\nselect = \"quest\"")) == std::vector<double>{0.1, 0.2});
  }
  SUBCASE("an own budget stays, once") {
    CHECK(densities(parse(budget + "[[strategy]]\nselect = { name = \"quest\", density = 0.4 }")) ==
          std::vector<double>{0.4});
    CHECK(parse(budget + "[[strategy]]\nselect = { name = \"quest\", tokens = 64 }").cells.size() == 1);
  }
  SUBCASE("none refuses it") {
    CHECK(densities(parse(budget + "[[strategy]]\nselect = { name = \"block_topk\", density = \"none\" }")) ==
          std::vector<double>{-1});
  }
  SUBCASE("strategies that take none are one cell") {
    CHECK(parse(budget + "[[strategy]]\nselect = \"dense\"").cells.size() == 1);
  }
  SUBCASE("a wrapper hands it to its base") {
    const Scenario s = parse(budget + "[[strategy]]\nselect = { name = \"twilight\", base = \"quest\" }");
    REQUIRE(s.cells.size() == 2);
    CHECK(s.cells[1].select->budget.kind == BudgetSpec::Kind::none);
    CHECK(s.cells[1].select->base->budget.value == 0.2);
  }
  SUBCASE("a wrapper of eviction takes it itself: its base only ranks") {
    const Scenario s = parse(budget + "[[strategy]]\nevict = { name = \"chunkkv\", base = \"snapkv\" }");
    REQUIRE(s.cells.size() == 2);
    CHECK(s.cells[1].evict->budget.value == 0.2);
    CHECK(s.cells[1].evict->base->budget.kind == BudgetSpec::Kind::none);
    CHECK(parse(budget + "[[strategy]]\nevict = \"decoding\"").cells.size() == 1);
  }
  SUBCASE("a wrapper's default base has a budget of its own") {
    const Scenario s = parse(budget + "[[strategy]]\nselect = \"twilight\"");
    REQUIRE(s.cells.size() == 1);
    CHECK(s.cells[0].label == "twilight");
    CHECK(s.cells[0].select->base->type->name() == "quest");
    CHECK(s.cells[0].select->base->budget.value == 0.25);
  }
  SUBCASE("each role of a cell") {
    const Scenario s = parse(
        budget + "[[strategy]]\nevict = { name = \"snapkv\", density = 0.5 }\nallocate = \"ada\"\nselect = \"quest\"");
    REQUIRE(s.cells.size() == 2);
    CHECK(s.cells[0].label == "snapkv + ada → quest");
    CHECK(role(s, 1, "evict")["density"] == 0.5);
    CHECK(role(s, 1, "select")["density"] == 0.2);
    CHECK_FALSE(role(s, 1, "allocate").contains("density"));
  }
  SUBCASE("the shape goes to prefill selection alone") {
    const Scenario s = parse(
        "[budget]\ndensity = 0.2\nshape = \"proportional\"\n[[strategy]]\nselect = [\"block_topk\", "
        "\"quest\"]\n[[strategy]]\nevict = \"h2o\"");
    CHECK(s.cells.at(0).select->budget.proportional);
    CHECK_FALSE(s.cells.at(1).select->budget.proportional);
    CHECK_FALSE(s.cells.at(2).evict->budget.proportional);
  }
  SUBCASE("the smallest density sets the default context") {
    CHECK(parse(budget + "[[strategy]]\nselect = \"quest\"").options.default_density == 0.1);
  }
}

TEST_CASE("seeds multiply stochastic cells alone") {
  const Scenario s = parse("run.seed = [3, 4]\n[[strategy]]\nselect = [\"random\", \"quest\"]");
  REQUIRE(labels_of(s) == Labels{"random", "random", "quest"});
  CHECK(s.cells[1].seed == 4);
  CHECK(s.cells[2].seed == 3);
}

TEST_CASE("[run] cut reaches evictions without one") {
  const Scenario s = parse(
      "run.cut = [\"end\", 100]\n[[strategy]]\nevict = \"snapkv\"\n[[strategy]]\nevict = { name = \"h2o\", cut = "
      "\"before_question\" }");
  REQUIRE(labels_of(s) == Labels{"snapkv(cut=end)", "snapkv(cut=100)", "h2o"});
  CHECK(role(s, 1, "evict")["cut"] == 100);
  CHECK(role(s, 2, "evict")["cut"] == "before_question");
}

TEST_CASE("[[exclude]] drops what it describes") {
  const std::string study =
      "budget.density = [0.1, 0.2]\n[[strategy]]\nselect = { name = \"quest\", page_size = [16, 32] "
      "}\n[[strategy]]\nselect = \"random\"\n";
  CHECK(parse(study).cells.size() == 6);
  CHECK(parse(study + "[[exclude]]\nselect = { name = \"quest\", page_size = 32, density = 0.1 }").cells.size() == 5);
  CHECK(parse(study + "[[exclude]]\nselect = \"random\"").cells.size() == 4);
  CHECK(
      parse(study + "[[exclude]]\nselect = { density = 0.1 }\n[[exclude]]\nselect = { page_size = 16 }").cells.size() ==
      2);
  CHECK(parse(study + "[[exclude]]\nselect = \"dense\"").cells.size() == 6);
  const std::string text = parse_error(study + "[[exclude]]\nselect = \"quest\"\n[[exclude]]\nselect = \"random\"");
  CHECK(text.find("no cell is left") != std::string::npos);
}

TEST_CASE("an allocator beside what it cannot change is refused, and what it can is not") {
  for (const char* pair :
       {"select = \"quest\"\nallocate = \"duo\"", "evict = \"streaming_llm\"\nallocate = \"pyramid\"",
        "evict = \"snapkv\"\nallocate = \"ada\"\nselect = \"dense\"", "allocate = \"duo\""})
    CHECK(parse_error(std::string("budget.density = 0.2\n[[strategy]]\n") + pair) == "");
  CHECK(labels_of(parse("[[strategy]]\nselect = [\"dense\", \"quest\"]\nallocate = \"duo\"\n[[exclude]]\nselect = "
                        "\"dense\"\nallocate = \"duo\"")) == Labels{"duo → quest"});
}

TEST_CASE("every mistake names its place and the way out") {
  struct Mistake {
    const char *text, *place, *part;  // place: line:column, the line after the first
  };
  const Mistake mistakes[] = {
      {"[run\n", ":2:", "syntax"},
      {"nmae = \"x\"", ":2:8", "did you mean 'name'"},
      {"name = 3", ":2:8", "a string"},
      {"run = 3", ":2:7", "a table"},
      {"run.devices = \"cpu\"", ":2:15", "did you mean 'device'"},
      {"run.device = \"gpu\"", ":2:14", "expected cpu or cuda"},
      {"run.phases = [\"prefil\"]", ":2:14", "did you mean 'prefill'"},
      {"run.phases = []", ":2:14", "without phases"},
      {"run.seed = [-1]", ":2:12", "at least 0"},
      {"run.seed = []", ":2:12", "at least one seed"},
      {"run.page_size = 0", ":2:17", "1..4096"},
      {"run.min_context = 1.5", ":2:19", "whole number"},
      {"run.check = 1", ":2:13", "true or false"},
      {"run.cut = \"middle\"", ":2:11", "before_question"},
      {"budget.density = [0.1, 1.5]", ":2:18", "(0, 1]"},
      {"budget.density = nan", ":2:18", "(0, 1]"},
      {"budget.tokens = 0.5", ":2:17", "whole numbers"},
      {"budget.densty = 0.1", ":2:17", "did you mean 'density'"},
      {"budget = { density = 0.1, tokens = 5 }", ":2:36", "two kinds of budget"},
      {"budget = { tokens = 5, shape = \"constant\" }", ":2:32", "beside a density"},
      {"[[strategy]]\nselect = \"qest\"", ":3:10", "did you mean 'quest'"},
      {"[[strategy]]\nselect = { name = \"twilight\", base = \"qest\" }", ":3:10", "did you mean 'quest'"},
      {"[[strategy]]\nevict = { name = \"snapkv\", kernel = 4 }", ":3:9", "expected kernel is odd, found kernel = 4"},
      {"[[strategy]]\nselect = { name = \"xattention\", block = 100 }", ":3:10",
       "expected block is a multiple of stride, found block = 100, stride = 16"},
      {"[[strategy]]\nselect = { name = \"vertical_slash\", block = [32, 48] }", ":3:10",
       "expected q_tile is a multiple of block, found block = 48, q_tile = 64"},
      {"[[strategy]]\nselect = \"dense\"\nallocate = \"duo\"", ":4:12", "'dense' chooses by itself"},
      {"[[strategy]]\nselect = \"twilight\"\nallocate = \"ada\"", ":4:12", "'twilight' chooses by itself"},
      {"[[strategy]]\nevict = \"streaming_llm\"\nallocate = \"duo\"", ":4:12", "'streaming_llm' chooses by itself"},
      {"[[strategy]]\nselect = { page_size = 3 }", ":3:10", "a name or"},
      {"[[strategy]]\nselect = { name = \"quest\", pagesize = 3 }", ":3:10", "did you mean 'page_size'"},
      {"[[strategy]]\nselect = { name = \"quest\", page_size = 0 }", ":3:10", "1..4096"},
      {"[[strategy]]\nselect = { name = \"quest\", page_size = \"x\" }", ":3:10", "a whole number"},
      {"[[strategy]]\nselect = { name = \"quest\", page_size = [] }", ":3:40", "an axis without a value"},
      {"[[strategy]]\nselect = { name = \"quest\", density = 2.0 }", ":3:10", "density"},
      {"[[strategy]]\nselect = { name = \"quest\", density = 0.1, tokens = 3 }", ":3:10", "two budgets"},
      {"[[strategy]]\nselect = \"snapkv\"", ":3:10", "cannot select"},
      {"[[strategy]]\nallocate = { name = \"ada\", density = 0.1 }", ":3:12", "shares out the budget"},
      {"[[strategy]]\nlabel = \"x\"", ":2:1", "without a role"},
      {"[[strategy]]\nselct = \"quest\"", ":3:9", "did you mean 'select'"},
      {"strategy = 1", ":2:12", "[[strategy]]"},
      {"name = \"x\"", "s.toml", "without strategies"},
      {"[[strategy]]\nselect = \"quest\"\n[[exclude]]\nselekt = \"quest\"", ":5:10", "did you mean 'select'"},
      {"[[strategy]]\nselect = \"quest\"\n[[exclude]]\nselect.page_siz = 3", ":5:19", "did you mean 'page_size'"},
      {"[[strategy]]\nselect = \"quest\"\nwhen = 1979-05-27", ":4:8", "date"},
  };
  for (const Mistake& m : mistakes) {
    const std::string text = parse_error(m.text);
    INFO(std::string(m.text), "\nerror: ", text);
    CHECK(text.find(m.place) != std::string::npos);
    CHECK(text.find(m.part) != std::string::npos);
  }
}

TEST_CASE("files that are none") {
  const auto error = [](const std::string& text) {
    const ScenarioFile file(text);
    try {
      load_scenario(file.path(), built_ins(), {});
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(error("[[strategy]]\nselect = \"quest\"").find("without traces") != std::string::npos);
  CHECK(error("trace.files = [\"a\", \"./a\"]\n[[strategy]]\nselect = \"quest\"").find("named twice") !=
        std::string::npos);
  CHECK(error("trace.files = [3]\n[[strategy]]\nselect = \"quest\"").find("a string") != std::string::npos);
  CHECK_THROWS_AS(load_scenario("/nowhere/s.toml", built_ins(), {}), Error);
}
