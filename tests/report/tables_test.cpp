#include "report/made_rows.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {
using Labels = std::vector<std::string>;
constexpr ReplayPhase kPrefill = ReplayPhase::prefill, kEvict = ReplayPhase::evict, kDecode = ReplayPhase::decode;
}  // namespace

TEST_CASE("a table a budget, best first, with the dense baseline in each") {
  // Cells: dense; block_topk at 0.2, 0.5; oracle_topk at 0.2, 0.5.
  MadeStudy made("budget.density = [0.2, 0.5]\n[[strategy]]\nselect = [\"dense\", \"block_topk\", \"oracle_topk\"]");
  const float mass[] = {1, 0.4f, 0.7f, 0.8f, 0.9f};
  for (int cell = -1; cell < 5; ++cell) made.add_both(cell, kPrefill, cell < 0 ? 1.f : mass[cell]);
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 2);
  CHECK(tables[0].budget == "density 0.2");
  CHECK(tables[1].density == 0.5);
  CHECK(labels_of(tables[0].lines) == Labels{"dense", "oracle_topk", "block_topk"});
  CHECK(tables[0].lines[1].metrics.at("mass_kept").mean == doctest::Approx(0.8));
  CHECK(tables[1].lines[2].metrics.at("mass_kept").mean == doctest::Approx(0.7));
  CHECK(tables[0].layers == std::vector<int>{0, 9});
  CHECK(tables[0].noise.at("output_rel_l2") == doctest::Approx(0.002));
  CHECK(tables[0].lines[1].touched_share == 1.0);
  CHECK(tables[0].lines[1].pages_share == doctest::Approx(0.4));
  CHECK(tables[0].lines[1].index_share == doctest::Approx(0.1));
}

TEST_CASE("layers are fixed effects, and the worst head is named") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = \"block_topk\"");
  made.add(0, kPrefill, 0, 0.9f);
  made.add(0, kPrefill, 9, 0.5f);
  const Line line = tabulate(made.study).at(0).lines.at(0);
  const PooledMetric& mass = line.metrics.at("mass_kept");
  CHECK(mass.mean == doctest::Approx(0.7));
  CHECK(mass.worst_head == doctest::Approx(0.5));
  CHECK(mass.worst_layer == 9);
  REQUIRE(mass.interval);
  CHECK(mass.interval->lo == doctest::Approx(0.7));
  CHECK(mass.queries == 64);
}

TEST_CASE("what breaks its budget is left out, with the reason") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = [\"block_topk\", \"oracle_topk\", \"random\"]");
  made.add_both(0, kPrefill, 0.9f);
  made.study.rows.back().marks = {"floor"};
  made.add_both(1, kPrefill, 0.8f);
  made.add_both(2, kPrefill, 0.6f);
  made.study.rows.back().marks = {"off-budget"};
  const auto tables = tabulate(made.study);
  CHECK(labels_of(tables.at(0).lines) == Labels{"oracle_topk"});
  REQUIRE(labels_of(tables[0].left_out) == Labels{"block_topk", "random"});
  CHECK(holds(tables[0].left_out[0].left_out, "floor: what it must read exceeds the budget in 1 of 2 rows"));
  CHECK(holds(tables[0].left_out[1].left_out, "off-budget"));
  const std::string text = to_markdown(made.study, tables);
  const auto line = text.find("left out at this density:");
  REQUIRE(line != std::string::npos);
  CHECK(text.find("| oracle_topk |") < line);
  CHECK(text.find("- block_topk: floor") > line);
  CHECK_FALSE(holds(text, "| block_topk |"));
}

TEST_CASE("a layer that one method keeps dense is left out for all") {
  MadeStudy made(
      "budget.density = 0.2\n[[strategy]]\nselect = [\"oracle_topk\", { name = \"quest\", dense_layers = [0, 1] }]");
  made.add_both(0, kDecode, 0.5f);
  made.add(1, kDecode, 0, 1.f).marks = {"dense-layer"};
  made.add(1, kDecode, 9, 0.6f);
  for (Row& row : made.study.rows)
    if (row.layer == 0 && row.cell == 0) row.metrics["mass_kept"] = constant("mass_kept", 0.1f);
  const Table table = tabulate(made.study).at(0);
  CHECK(table.layers == std::vector<int>{9});
  CHECK(labels_of(table.lines) == Labels{"quest", "oracle_topk"});
  CHECK(table.lines[1].metrics.at("mass_kept").mean == doctest::Approx(0.5));
  CHECK(table.lines[0].realised_head == 0.5);
  CHECK(table.lines[0].realised_head_all.value() == doctest::Approx((0.5 * 8 + 2) / 10));
  CHECK(holds(table.notes.at(0), "layers 0 are kept dense"));
}

TEST_CASE("seeds are pooled, cells that act alike are one line") {
  MadeStudy made(
      "budget.density = 0.2\nrun.seed = [0, 1]\n[[strategy]]\nselect = \"random\"\n"
      "[[strategy]]\nevict = \"snapkv\"\n[[strategy]]\nevict = \"snapkv\"\nselect = { name = \"quest\", page_size = "
      "[16, 32] }");
  REQUIRE(made.study.scenario.cells.size() == 5);
  made.add_both(0, kPrefill, 0.4f);
  made.add_both(1, kPrefill, 0.6f);
  for (int cell = 2; cell < 5; ++cell) made.add_both(cell, kEvict, 0.7f);
  made.add_both(3, kDecode, 0.7f);
  made.add_both(4, kDecode, 0.6f);
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 3);
  REQUIRE(tables[0].lines.size() == 1);
  CHECK(tables[0].lines[0].seeds == std::vector<std::uint64_t>{0, 1});
  CHECK(tables[0].lines[0].metrics.at("mass_kept").mean == doctest::Approx(0.5));
  CHECK(labels_of(tables[1].lines) == Labels{"snapkv"});
  CHECK(tables[1].lines.at(0).cells == std::vector<int>{2});
  CHECK(labels_of(tables[2].lines) == Labels{"snapkv → quest(page_size=16)", "snapkv → quest(page_size=32)"});
  made.study.rows[0].marks = {"stochastic"};
  CHECK(holds(to_markdown(made.study, tabulate(made.study)), "fewer than 5 seeds"));
}

TEST_CASE("the worst head and the tail of a method with seeds are of its means, not of its unluckiest draw") {
  MadeStudy made("budget.density = 0.2\nrun.seed = [0, 1]\n[[strategy]]\nselect = \"random\"");
  made.add_both(0, kPrefill, 0);
  made.add_both(1, kPrefill, 0);
  for (Row& row : made.study.rows)
    row.metrics["mass_kept"] = constant("mass_kept", row.cell == 0 ? std::vector{0.4f, 0.6f} : std::vector{0.6f, 0.5f});
  const PooledMetric mass = tabulate(made.study).at(0).lines.at(0).metrics.at("mass_kept");
  CHECK(mass.mean == doctest::Approx(0.525));
  CHECK(mass.worst_head == doctest::Approx(0.5));  // head 0; the worst draw of any is 0.4
  CHECK(mass.worst_head_index == 0);
  CHECK(mass.p1 == doctest::Approx(0.45).epsilon(0.01));  // 0.4 in one run, 0.5 in the other, to a bin
  CHECK(mass.queries == 64);
}

TEST_CASE("a share is of a layer by pairs, then of the layers, whichever trace captured which") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = \"block_topk\"", {"m", "m"});
  made.study.traces[1].prefill_tokens = 200;
  const auto share = [&](int layer, std::size_t trace, double realised) {
    Row& row = made.add(0, kPrefill, layer, 0.5f, trace);
    row.realised_head = row.realised_union = row.target_share = row.read_share = realised;
  };
  share(0, 0, 0.2);
  share(0, 1, 0.4);
  share(9, 0, 0.6);
  const double first = (0.2 * 5050 + 0.4 * 20100) / (5050 + 20100);
  const Line line = tabulate(made.study).at(0).lines.at(0);
  for (const double found : {line.realised_head, line.realised_union, *line.target, line.read_share,
                             *line.realised_head_all, *line.realised_union_all})
    CHECK(found == doctest::Approx((first + 0.6) / 2));
}

TEST_CASE("the share of the whole model counts sliding-window layers at their window") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = { name = \"quest\", dense_layers = [3] }");
  made.study.traces[0].sliding_window = {{0, 16}};
  made.study.traces[0].mixed_layers = true;
  made.add(0, kDecode, 0, 1.f).marks = {"sliding-window"};
  made.add(0, kDecode, 9, 0.6f);
  // 64 queries after 100 tokens; of 10 layers 5 are taken to have the window, 1 is dense.
  const double full = (164 * 165 - 100 * 101) / 2, window = 64 * 16;
  const auto line = [&] { return tabulate(made.study).at(0).lines.at(0); };
  CHECK(line().realised_head == 0.5);
  CHECK(line().realised_head_all.value() ==
        doctest::Approx((4 * 0.5 * full + full + 5 * window) / (5 * full + 5 * window)));
  SUBCASE("evict: the tokens before the cut that a window holds") {
    MadeStudy evicted("budget.density = 0.2\n[[strategy]]\nevict = \"snapkv\"");
    evicted.study.traces[0].sliding_window = {{0, 16}};
    evicted.add(0, kEvict, 9, 0.6f).cut = 80;
    CHECK(tabulate(evicted.study).at(0).lines.at(0).realised_head_all.value() ==
          doctest::Approx((0.5 * 80 + 16) / (80 + 16)));
  }
  SUBCASE("unknown where only one of two kinds was captured") {
    made.study.traces[0].sliding_window.clear();
    CHECK_FALSE(line().realised_head_all);
    const Json json = to_json(made.study, tabulate(made.study));
    CHECK(json["tables"][0]["lines"][0]["realised"]["all_layers"]["head"].is_null());
    CHECK(json["tables"][0]["lines"][0]["realised"]["sparse_layers"]["head"] == 0.5);
  }
}

TEST_CASE("selections from what an eviction left stand apart from those of one role") {
  MadeStudy made(
      "budget.density = 0.2\n[[strategy]]\nselect = [\"dense\", \"quest\"]\n"
      "[[strategy]]\nevict = { name = \"snapkv\", density = [0.2, 0.5] }\nselect = \"quest\"\n"
      "[[strategy]]\nevict = \"h2o\"\nselect = \"magicpig\"");
  REQUIRE(made.study.scenario.cells.size() == 5);
  for (int cell = 0; cell < 5; ++cell) {
    made.add_both(cell, kDecode, 0.5f);
    for (std::size_t i = made.study.rows.size() - 2; i < made.study.rows.size(); ++i)
      made.study.rows[i].read_share = cell == 3 ? 0.1 : 0.2;
  }
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 4);
  const Labels titles = {"density 0.2", "evict density 0.2 × density 0.2", "evict density 0.5 × density 0.2",
                         "evict density 0.2 × own budget"};
  const std::vector<Labels> lines = {
      {"dense", "quest"}, {"dense", "snapkv → quest"}, {"dense", "snapkv → quest"}, {"dense", "h2o → magicpig"}};
  for (std::size_t t = 0; t < 4; ++t) {
    CHECK(tables[t].budget == titles[t]);
    CHECK(tables[t].compound == (t > 0));
    CHECK(labels_of(tables[t].lines) == lines[t]);
  }
  CHECK(tables[2].lines[1].read_share == doctest::Approx(0.1));
  const std::string text = to_markdown(made.study, tables);
  CHECK(holds(text, "## decode, evict density 0.5 × density 0.2 (m)"));
  CHECK(holds(text, "read % is the product"));
}

TEST_CASE("methods without a budget stand apart") {
  MadeStudy made(
      "budget.density = 0.2\n[[strategy]]\nselect = [\"dense\", \"quest\", \"magicpig\", { name = \"twilight\", base = "
      "\"quest\" }]");
  for (int cell = 0; cell < 4; ++cell) made.add_both(cell, kDecode, 0.5f);
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 2);
  CHECK(labels_of(tables[0].lines) == Labels{"dense", "quest"});
  CHECK(tables[1].budget == "own budget");
  CHECK(labels_of(tables[1].lines) == Labels{"dense", "magicpig", "twilight(base=quest) [base density 0.2]"});
}

TEST_CASE("cuts have tables of their own") {
  MadeStudy made("budget.density = 0.2\nrun.cut = [\"before_question\", \"end\"]\n[[strategy]]\nevict = \"snapkv\"");
  for (int cell = 0; cell < 2; ++cell) {
    made.add_both(cell, kEvict, 0.5f);
    made.study.rows[made.study.rows.size() - 1].cut = made.study.rows[made.study.rows.size() - 2].cut = 100 + cell;
  }
  made.add(-1, kEvict, 0, 1.f).cut = 100;
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 2);
  CHECK(tables[0].cut == "before_question");
  CHECK(tables[0].noise.size() == 3);
  CHECK(tables[1].cut == "end");
  CHECK(tables[1].noise.empty());
}

TEST_CASE("traces of a model are averaged, models are not") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = \"quest\"", {"a", "a", "b"});
  made.add_both(0, kDecode, 0.5f, 0);
  made.add_both(0, kDecode, 0.7f, 1);
  made.add_both(0, kDecode, 0.1f, 2);
  const auto tables = tabulate(made.study);
  REQUIRE(tables.size() == 2);
  const PooledMetric& mass = tables[0].lines.at(0).metrics.at("mass_kept");
  CHECK(mass.mean == doctest::Approx(0.6));
  CHECK_FALSE(mass.interval);
  CHECK(mass.note == "n = 2 traces, no interval across prompts");
  CHECK(mass.worst_trace == "t0");
  CHECK(tables[1].model == "b");
  CHECK(tables[1].lines.at(0).metrics.at("mass_kept").mean == doctest::Approx(0.1));
  CHECK(holds(to_markdown(made.study, tables), "- n = 2 traces, no interval across prompts"));
}

TEST_CASE("failed cells are compared nowhere in that phase, and said") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = [\"quest\", \"oracle_topk\"]");
  made.add_both(0, kDecode, 0.5f);
  made.add_both(1, kDecode, 0.6f);
  made.study.rows[0].status = "failed";
  made.study.rows[0].error = "page | lost";
  made.study.rows[0].metrics.clear();
  made.study.skips = {{0, kPrefill, "no way"}, {0, kPrefill, "no way"}};
  const auto tables = tabulate(made.study);
  CHECK(labels_of(tables.at(0).lines) == Labels{"oracle_topk"});
  const std::string text = to_markdown(made.study, tables);
  CHECK(holds(text, "## Failed\n\n- quest, decode, layers 0: page \\| lost"));
  CHECK(holds(text, "## Skipped\n\n- prefill: no way: quest (select)\n"));
}

TEST_CASE("a method that misses layers says so") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = [\"quest\", \"oracle_topk\"]");
  made.add_both(0, kDecode, 0.5f);
  made.add(1, kDecode, 0, 0.6f);
  const Table table = tabulate(made.study).at(0);
  CHECK(table.lines.at(0).label == "oracle_topk");
  CHECK(table.lines[0].marks.count("partial") == 1);
  CHECK(table.lines[1].marks.empty());
}

TEST_CASE("sliding-window layers are compared nowhere, and said") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = \"quest\"");
  made.add(0, kDecode, 0, 1.f).marks = {"sliding-window"};
  made.add(0, kDecode, 9, 0.6f);
  const auto tables = tabulate(made.study);
  CHECK(tables.at(0).layers == std::vector<int>{9});
  CHECK(holds(to_markdown(made.study, tables), "t0 layer 0 has a sliding window"));
}

TEST_CASE("markdown") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = [\"dense\", \"block_topk\"]");
  for (const int layer : {0, 9}) made.add(-1, kPrefill, layer, 1.f);
  made.add_both(0, kPrefill, 0.999f);
  made.add_both(1, kPrefill, 0.5f);
  const std::string text = to_markdown(made.study, tabulate(made.study));
  // The noise floor of output_rel_l2 is 0.002: the baseline's 0.001 is within it, the method's 0.5 is not.
  CHECK(text.find("| noise floor") < text.find("| dense |"));
  CHECK(holds(text, "| dense | 2 | 0.9990 [0.9990, 0.9990] | -0.0010 | ≈0 |"));
  CHECK(holds(text, "| block_topk | 2 | 0.5000 [0.5000, 0.5000] | -0.5000 | 0.5000 |"));
  CHECK(holds(text, "blind spot"));
  CHECK_FALSE(holds(text, "answer |"));
  CHECK(text == to_markdown(made.study, tabulate(made.study)));
}

TEST_CASE("JSON") {
  MadeStudy made("budget.density = 0.2\n[[strategy]]\nselect = \"quest\"");
  made.add_both(0, kDecode, 0.1f);
  made.study.rows[1].realised_head = std::numeric_limits<double>::quiet_NaN();
  const auto tables = tabulate(made.study);
  const Json json = to_json(made.study, tables);
  CHECK(json["rows"][0]["metrics"]["mass_kept"]["mean"].get<double>() == static_cast<double>(0.1f));
  CHECK(json["rows"][0]["time"]["seconds"] == 1.0);
  CHECK(json["tables"][0]["lines"][0]["cells"] == Json::array({0}));
  CHECK(json["cells"][0]["select"]["density"] == 0.2);
  const ScenarioFile scratch("");
  const std::string path = scratch.directory() + "/x.json";
  write_json(json, path);
  write_json(json, path);
  std::ifstream in(path);
  const Json back = Json::parse(in);
  CHECK(back["rows"][1]["realised_head"].is_null());
  CHECK(back["rows"][0] == json["rows"][0]);
  CHECK_THROWS_AS(write_json(json, scratch.directory() + "/none/x.json"), Error);
  CHECK_THROWS_AS(write_json(json, scratch.directory()), Error);
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& file : std::filesystem::directory_iterator(scratch.directory())) ++files;
  CHECK(files == 2);  // no temporary is left
}
