#include "report/cost_table.hpp"
#include "report/made_rows.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

Timing timing(double us, bool graph, bool launch_bound = false, int runs = 30) {
  return {us, us - 2, us + 3, runs, graph, graph ? 5 : 0, launch_bound};
}

/// Dense attention of 200 us; quest in 50, a pure decode after snapkv, an eviction, and one that failed.
MadeStudy timed_study() {
  MadeStudy made(
      "budget.density = 0.2\n[[strategy]]\nselect = \"quest\"\nlabel = \"a|b\"\n[[strategy]]\nevict = \"snapkv\"");
  CostResult cost;
  cost.device = "Test GPU";
  cost.source = "t.safetensors layer 9";
  cost.peaks.read_gb_s = 4000;
  cost.peaks.l2_bytes = 50 << 20;
  cost.memory = {"32768 tokens: 2.00 GiB: KV caches 2.00 GiB"};
  CostRow dense;
  dense.tokens = 32768;
  dense.total = dense.attention = timing(200, true);
  dense.lower_bound_us = 33.6;
  dense.before = Clocks{1500, 2600, 1980, 300, 40, "none"};
  dense.after = Clocks{1710, 2600, 1980, 300, 40, "software power cap"};
  CostRow quest = dense;
  quest.cell = 0;
  quest.total = timing(50, true, true, 12);
  quest.choice = timing(30, true);
  quest.attention = timing(20.25, true);
  quest.index = timing(4, true);
  quest.lower_bound_us = 9.876;
  quest.speedup = 4;
  CostRow evict;
  evict.cell = 1;
  evict.phase = ReplayPhase::evict;
  evict.tokens = 32768;
  evict.total = timing(2500, false, false, 5);
  CostRow failed;
  failed.cell = 1;
  failed.tokens = 32768;
  failed.error = "out of device memory";
  CostRow on_cpu;
  on_cpu.tokens = 32768;
  on_cpu.cell = 0;
  on_cpu.untimed = "a strategy without code for the GPU";
  cost.rows = {dense, quest, evict, failed, on_cpu};
  made.study.cost = cost;
  return made;
}

}  // namespace

TEST_CASE("the section on cost has a line a row, and what it was measured on") {
  const MadeStudy made = timed_study();
  const std::string text = cost_section(made.study);
  CAPTURE(text);
  CHECK(text.rfind("\n## Cost on Test GPU\n", 0) == 0);
  CHECK(holds(text, "| dense attention |  | decode | 32768 | 200 [198, 203] | – | 200 | – | 33.6 | 1.00 | graph |\n"));
  CHECK(holds(text,
              "| a\\|b | density 0.2 | decode | 32768 | 50.0 [48.0, 53.0] | 30.0 | 20.2 | 4.0 | 9.9 | 4.00 | graph, "
              "launch-bound, n = 12 |\n"));
  CHECK(holds(text,
              "| snapkv | density 0.2 | evict | 32768 | 2500 [2498, 2503] | – | – | – | 0.0 | – | host included |\n"));
  CHECK(holds(text, "best dense kernel of this run: Lacuna's dense attention, decode at 32768 tokens 200 us"));
  CHECK(holds(text, "1500 to 1710 MHz of 1980; limited by: none; software power cap"));
  CHECK(holds(text, "memory: 32768 tokens: 2.00 GiB"));
  CHECK(holds(text,
              "not timed:\n\n- snapkv, decode, 32768 tokens: out of device memory\n- a\\|b, decode, 32768 tokens: a "
              "strategy without code for the GPU\n"));
  CHECK(holds(to_markdown(made.study, tabulate(made.study)), text));
}

TEST_CASE("the JSON has every time and what it stands beside, and nothing where nothing was timed") {
  const MadeStudy made = timed_study();
  const Json json = to_json(made.study, {});
  const Json& rows = json["cost"]["rows"];
  REQUIRE(rows.size() == 5);
  CHECK(rows[0]["cell"] == "dense_attention");
  CHECK(rows[1]["cell"] == 0);
  CHECK(rows[1]["choice"]["median_us"] == 30);
  CHECK(rows[1]["total"]["q3_us"] == 53);
  CHECK(rows[1]["total"]["launch_bound"] == true);
  CHECK(rows[1]["speedup"] == 4);
  CHECK(rows[0]["clocks_after"]["sm_mhz"] == 1710);
  CHECK(rows[2]["attention"].is_null());
  CHECK(rows[3]["error"] == "out of device memory");
  CHECK(json["cost"]["peaks"]["read_gb_s"] == 4000);
  StudyResult untimed = made.study;
  untimed.cost.reset();
  CHECK_FALSE(to_json(untimed, {}).contains("cost"));
  CHECK(cost_section(untimed).empty());
}
