// The timing pass on a GPU: graphs, no allocation on the timed path, and the same selections whatever was called.
#include <doctest/doctest.h>

#include "forwarding_device.hpp"
#include "replay/support.hpp"
#include "replay/timing_bench.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using namespace lacuna::sdk;

namespace {

/// The GPU, counting what is allocated.
class CountingDevice final : public ForwardingDevice {
 public:
  CountingDevice() : ForwardingDevice(cuda_device()) {}
  void* allocate(std::size_t bytes) override {
    ++allocations;
    return ForwardingDevice::allocate(bytes);
  }

  int allocations = 0;
};

constexpr i64 kTokens = 4096;

CostOptions small_options() {
  CostOptions o;
  o.wanted = true;
  o.shape = {8, 2, 64, {kTokens}};
  return o;
}

Cell quest() { return cell_of({{"select", {{"name", "quest"}, {"density", 0.1}, {"dense_layers", Json::array()}}}}); }

}  // namespace

TEST_CASE("GPU: a decode step allocates nothing once it was called, and chooses the same before and after") {
  const auto device = std::make_shared<CountingDevice>();
  const Trace trace = Trace::open(kShipped);
  TimedLayer layer(tile_layer(trace, 9, small_options().shape, kTokens, Dtype::bf16), kTokens, 16, Dtype::bf16, device);
  SelectBench bench(layer, quest(), ReplayPhase::decode, 3);
  const auto sets = [&] {
    return bench.pipeline(2).choose_for(bench.span(), ChooseOptions{}, [](const Selection&) {}).sets;
  };
  const std::vector<RowSet> before = sets();
  for (const auto& variants : {bench.steps(), bench.choices(), bench.indexings()}) {
    REQUIRE(variants.size() == 3);
    for (const auto& variant : variants) variant();
    const int allocations = device->allocations;
    for (const auto& variant : variants) variant();
    CHECK(device->allocations == allocations);
    const Timing timing = time_work(*device, variants, false, {2, 5, 0., 1.});
    CHECK(timing.graph);
    CHECK(device->allocations == allocations);
  }
  bench.with_attention([&](const Meter::Variants& variants) {
    REQUIRE(variants.size() == 3);
    for (const auto& variant : variants) variant();
    const int allocations = device->allocations;
    CHECK(time_work(*device, variants, false, {2, 5, 0., 1.}).graph);
    CHECK(device->allocations == allocations);
  });
  const std::vector<RowSet> after = sets();
  REQUIRE(after.size() == before.size());
  std::size_t listed = 0;
  for (std::size_t i = 0; i < after.size(); ++i) {
    CHECK(after[i].slots == before[i].slots);
    listed += after[i].slots.size();
  }
  CHECK(listed > 0);
  CHECK(listed < 8 * kTokens / 5);
}

TEST_CASE("GPU: the pass times every phase, beside dense attention and a bound that no time is under") {
  CostRun run;
  run.device = cuda_device();
  const std::vector<Cell> cells = {quest(), cell_of({{"select", {{"name", "block_topk"}, {"density", 0.1}}}}),
                                   cell_of({{"evict", {{"name", "snapkv"}, {"density", 0.1}}}})};
  const CostResult result = time_cells(Trace::open(kShipped), cells, small_options(), run);
  CHECK(result.peaks.read_gb_s > 0);
  REQUIRE(result.rows.size() == 6);  // prefill: dense, block_topk; evict: snapkv; decode: dense, quest, after snapkv
  for (const CostRow& row : result.rows) {
    CAPTURE(row.cell);
    CAPTURE(name_of(row.phase));
    CAPTURE(row.error);
    REQUIRE(row.total);
    CHECK(row.total->q1_us <= row.total->median_us);
    CHECK(row.total->median_us > row.lower_bound_us);
    if (row.phase == ReplayPhase::evict) continue;
    CHECK(row.total->runs >= 30);
    REQUIRE(row.attention);
    CHECK(row.speedup.has_value() == (row.cell >= 0));
    if (row.phase == ReplayPhase::decode) CHECK(row.total->graph);
    if (!row.choice) continue;
    // A whole step is its two halves in one graph.
    CHECK(row.choice->median_us < row.total->median_us);
    CHECK(row.attention->median_us < row.total->median_us);
    CHECK(row.total->median_us < 1.5 * (row.choice->median_us + row.attention->median_us));
  }
}
