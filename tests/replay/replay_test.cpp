// replay(): which rows there are, and what the layers below it must have counted.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "lacuna/base/error.hpp"
#include "replay/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

Trace small_trace(std::int64_t decode = 10) {
  SyntheticSpec spec;
  spec.num_qo_heads = 4;
  spec.num_kv_heads = 2;
  spec.prefill_tokens = 260;
  spec.decode_tokens = decode;
  spec.captured_layers = {0, 3};
  spec.with_wo = true;
  return synthetic_trace(spec);
}

ReplayOptions all_phases() {
  ReplayOptions o;
  o.phases = {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode};
  o.check = true;
  return o;
}

}  // namespace

TEST_CASE("rows by layer, phase and cell, a noise row in each phase and cut, and a reason for what is skipped") {
  const std::vector<Cell> cells = {
      cell_of({{"select", {{"name", "random"}, {"density", 0.2}}}}),
      cell_of({{"select", {{"name", "quest"}, {"density", 0.2}}}}),
      cell_of({{"evict", {{"name", "snapkv"}, {"density", 0.2}, {"cut", "before_question"}}}}),
      cell_of({{"evict", {{"name", "h2o"}, {"density", 0.2}}}})};
  std::size_t reported = 0;
  ReplayOptions options = all_phases();
  options.on_row = [&](const Row&) { ++reported; };
  const ReplayResult r = replay(small_trace(), cells, options);
  CHECK(reported == r.rows.size());
  std::vector<std::tuple<int, ReplayPhase, std::int64_t, int>> found, expected;
  for (const Row& row : r.rows) found.emplace_back(row.layer, row.phase, row.cut, row.cell);
  for (const int layer : {0, 3}) {
    for (const int cell : {-1, 0}) expected.emplace_back(layer, ReplayPhase::prefill, -1, cell);
    for (const int cell : {-1, 2}) expected.emplace_back(layer, ReplayPhase::evict, 244, cell);
    for (const int cell : {-1, 3}) expected.emplace_back(layer, ReplayPhase::evict, 260, cell);
    for (const int cell : {-1, 0, 1, 2, 3}) expected.emplace_back(layer, ReplayPhase::decode, -1, cell);
  }
  CHECK(found == expected);
  for (const Row& row : r.rows) {
    CHECK(row.status == "ok");
    CHECK(row.metrics.count("layer_rel_l2") == 1);
    CHECK(row.metrics.count("regret") == 1);
    // quest leaves layers 0 and 1 dense unless told otherwise.
    CHECK(row.marked("dense-layer") == (row.cell == 1 && row.layer == 0));
    CHECK(row.marked("stochastic") == (row.cell == 0));
    CHECK(row.marked("query-aware") == (row.cell >= 2));
  }
  std::vector<std::pair<int, ReplayPhase>> skipped;
  for (const Skip& s : r.skips) {
    skipped.emplace_back(s.cell, s.phase);
    CHECK_FALSE(s.reason.empty());
  }
  CHECK(skipped == std::vector<std::pair<int, ReplayPhase>>{{0, ReplayPhase::evict},
                                                            {1, ReplayPhase::prefill},
                                                            {1, ReplayPhase::evict},
                                                            {2, ReplayPhase::prefill},
                                                            {3, ReplayPhase::prefill}});
}

TEST_CASE("a trace without decode tokens skips decode, and a stopped replay ends between cells") {
  const std::vector<Cell> cells = {cell_of({{"select", {{"name", "random"}, {"density", 0.2}}}}),
                                   cell_of({{"select", {{"name", "dense"}}}})};
  const ReplayResult none = replay(small_trace(0), cells, all_phases());
  for (const Row& row : none.rows) CHECK(row.phase == ReplayPhase::prefill);
  ReplayOptions options = all_phases();
  int asked = 0;
  options.stop = [&] { return ++asked > 2; };
  const ReplayResult cut = replay(small_trace(), cells, options);
  CHECK(std::count_if(cut.rows.begin(), cut.rows.end(), [](const Row& row) { return row.cell >= 0; }) == 1);
}

TEST_CASE("queries with too little context are left out of a comparison, the same for every method") {
  CHECK(default_min_context(0.1, 2000) == 320);
  CHECK(default_min_context(0.01, 2000) == 1024);
  CHECK(default_min_context(1, 2000) == 64);
  const std::vector<Cell> cells = {cell_of({{"select", {{"name", "random"}, {"density", 0.5}}}}),
                                   cell_of({{"select", {{"name", "dense"}}}})};
  ReplayOptions options = all_phases();
  options.phases = {ReplayPhase::prefill};
  options.default_density = 0.5;
  for (const Row& row : replay(small_trace(), cells, options).rows) {
    if (row.cell < 0) continue;
    CHECK(row.min_context == 64);
    CHECK(row.left_out == 63);
    std::int64_t counted = 0;
    for (const BlockStats& s : row.metrics.at("mass_kept").cells) counted += s.count + s.undefined;
    CHECK(counted == 4 * (260 - 63));
  }
}

TEST_CASE("an allocator serves the role that it stands beside, in its own phases only") {
  const Cell pyramid =
      cell_of({{"select", {{"name", "quest"}, {"density", 0.2}}}, {"allocate", {{"name", "pyramid"}}}});
  const TraceInfo info = small_trace().info();
  CHECK(why_skipped(pyramid, ReplayPhase::decode, info).find("'pyramid' does not allocate in decode") !=
        std::string::npos);
  const Cell both = cell_of({{"select", {{"name", "oracle_topk"}, {"density", 0.2}}},
                             {"evict", {{"name", "snapkv"}, {"density", 0.5}}},
                             {"allocate", {{"name", "ada"}}}});
  CHECK(why_skipped(both, ReplayPhase::prefill, info).empty());
  CHECK(why_skipped(both, ReplayPhase::decode, info).empty());
  // Prefill is then as if neither eviction nor allocator were there.
  const Cell alone = cell_of({{"select", {{"name", "oracle_topk"}, {"density", 0.2}}}});
  ReplayOptions options = all_phases();
  options.phases = {ReplayPhase::prefill};
  const ReplayResult r = replay(small_trace(), {both, alone}, options);
  CHECK(r.rows[1].metrics.at("mass_kept").cells[3].sum == r.rows[2].metrics.at("mass_kept").cells[3].sum);
  CHECK(r.rows[1].realised_head == r.rows[2].realised_head);
}

TEST_CASE("what a selection after an eviction reads is the product of both") {
  const ReplayResult r = replay(small_trace(),
                                {cell_of({{"select", {{"name", "oracle_topk"}, {"density", 0.5}}},
                                          {"evict", {{"name", "snapkv"}, {"density", 0.4}, {"window", 16}}}})},
                                [] {
                                  ReplayOptions o = all_phases();
                                  o.phases = {ReplayPhase::decode};
                                  return o;
                                }());
  const Row& row = r.rows[1];
  CHECK(row.realised_head == doctest::Approx(0.5).epsilon(0.02));
  CHECK(row.read_share == doctest::Approx(0.5 * (0.4 * 260 + 5.5) / 265.5).epsilon(0.03));
  CHECK(row.cost.kv_bytes < 0.5 * row.cost.dense_kv_bytes);
}

TEST_CASE("cuts: the end, the question, or a token inside the prompt") {
  const TraceInfo info = small_trace().info();
  CHECK(cut_of(info, "end") == 260);
  CHECK(cut_of(info, "before_question") == 244);
  CHECK(cut_of(info, "17") == 17);
  for (const char* bad : {"0", "261", "-3", "soon"}) CHECK_THROWS_AS(cut_of(info, bad), Error);
}
