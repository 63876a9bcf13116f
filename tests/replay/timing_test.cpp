// The timing pass without a GPU: the layer that is timed, what is counted of the methods, and the pass itself with a
// meter that calls what it is given and makes up the times.
#include <doctest/doctest.h>

#include <algorithm>

#include "replay/phase_run.hpp"
#include "replay/support.hpp"
#include "replay/timing_bench.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using namespace lacuna::sdk;

namespace {

constexpr CostShape small_shape() { return {4, 2, 64, {}}; }

CostOptions small_options(i64 tokens) {
  CostOptions o;
  o.wanted = true;
  o.shape = small_shape();
  o.shape.tokens = {tokens};
  return o;
}

/// A copy an L2 cache of 64 KiB does not hold twice; a time is 1000 us for each variant.
struct FakeMeter {
  FakeMeter() {
    meter.peaks.read_gb_s = 1;
    meter.peaks.gemm_tflop_s = 1;
    meter.peaks.l2_bytes = 64 << 10;
    meter.free_bytes = [this] { return free_bytes; };
    meter.clocks = [] { return std::nullopt; };
    meter.time = [this](const Meter::Variants& variants, const TimingOptions& how) {
      for (int round = 0; round < 2; ++round)
        for (const auto& variant : variants) variant();
      const double us = 1000.0 * static_cast<double>(variants.size());
      return Timing{us, us - 1, us + 1, how.runs, true, 7, false};
    };
  }
  Meter meter;
  std::size_t free_bytes = std::size_t{1} << 40;
};

CostResult pass(const Trace& trace, const std::vector<Cell>& cells, const CostOptions& options, const Meter& meter) {
  CostRun run;
  run.device = cpu_device();
  return time_cells_with(trace, cells, options, run, meter);
}

TiledLayer tiled(const Trace& trace, i64 tokens) { return tile_layer(trace, 9, small_shape(), tokens, Dtype::bf16); }

}  // namespace

TEST_CASE("a tiled layer has the trace's logits, exactly") {
  const Trace trace = Trace::open(kShipped);
  const TraceInfo& info = trace.info();
  REQUIRE(info.head_dim == 64);
  const i32 from_group = info.num_qo_heads / info.num_kv_heads;
  const i64 from_tokens = info.tokens(), tokens = from_tokens + 150;
  const CostShape shape{12, 6, 128, {}};
  const TiledLayer tile = tile_layer(trace, 9, shape, tokens, Dtype::bf16);
  const LayerTensors t = trace.layer(9);
  REQUIRE(t.q.dtype == Dtype::bf16);
  CHECK(tile.source.find("64 channels repeated 2 times") != std::string::npos);
  const auto dot = [](const Tensor* qt, const Tensor* kt, const u16* q, const u16* k, i64 qa, i64 ka, i64 d) {
    double sum = 0;
    for (i64 c = 0; c < d; ++c)
      sum += static_cast<double>(qt ? load(qt->data, qt->dtype, qa + c) : from_bf16(q[qa + c])) *
             static_cast<double>(kt ? load(kt->data, kt->dtype, ka + c) : from_bf16(k[ka + c]));
    return sum;
  };
  for (i64 head = 0; head < 12; ++head)
    for (const i64 query : {i64{7}, tokens - 1})
      for (const i64 key : {i64{0}, i64{7}, tokens - 150}) {
        CAPTURE(head);
        CAPTURE(query);
        CAPTURE(key);
        const i64 kv = head / 2, from_kv = kv % info.num_kv_heads,
                  from_head = from_kv * from_group + head % 2 % from_group;
        const double expected = dot(&t.q, &t.k, nullptr, nullptr, (from_head * from_tokens + query % from_tokens) * 64,
                                    (from_kv * from_tokens + key % from_tokens) * 64, 64);
        const double found = dot(nullptr, nullptr, tile.q.data(), tile.k.data(), (head * tokens + query) * 128,
                                 (kv * tokens + key) * 128, 128);
        CHECK(found * static_cast<double>(tile.layer.softmax_scale) ==
              expected * static_cast<double>(info.softmax_scale.at(9)));
      }
  const auto value = [&](i64 kv, i64 token, i64 c) {
    return from_bf16(tile.v[static_cast<std::size_t>((kv * tokens + token) * 128 + c)]);
  };
  CHECK(value(4, from_tokens + 3, 64 + 5) ==
        load(t.v.data, t.v.dtype, (4 % info.num_kv_heads * from_tokens + 3) * 64 + 5));
}

TEST_CASE("a head size that the trace's does not divide gives a synthetic layer, and says so") {
  const TiledLayer tile = tile_layer(Trace::open(kShipped), 9, {4, 2, 96, {}}, 300, Dtype::bf16);
  CHECK(tile.source.rfind("synthetic", 0) == 0);
  CHECK(tile.layer.index == 9);
  CHECK(tile.q.size() == 4 * 300 * 96);
  CHECK(tile.k != std::vector<u16>(tile.k.size(), tile.k[0]));
}

TEST_CASE("the layer to time is one that no cell keeps dense") {
  const TraceInfo info = Trace::open(kShipped).info();
  const std::vector<int> layers = info.captured_layers;
  REQUIRE(layers.size() >= 3);
  const auto dense_in = [](std::vector<int> dense) {
    return cell_of({{"select", {{"name", "quest"}, {"density", 0.2}, {"dense_layers", dense}}}});
  };
  const int middle = layers[layers.size() / 2];
  CHECK(layer_to_time(info, {dense_in({})}) == middle);
  std::vector<int> all_but_first(layers.begin() + 1, layers.end());
  CHECK(layer_to_time(info, {dense_in({middle}), dense_in(all_but_first)}) == layers.front());
  CHECK(layer_to_time(info, {dense_in(layers)}) == middle);
}

TEST_CASE("a lower bound is the slower of memory and products") {
  DevicePeaks peaks{};
  peaks.read_gb_s = 4000;
  peaks.gemm_tflop_s = 800;
  // Decode at 32K tokens: 8 KV heads * 32768 * 512 bytes = 134217728; 4 * 128 * 32 heads * 32768 pairs.
  CHECK(lower_bound_us(134217728, 536870912, peaks) == doctest::Approx(33.554432));
  // Prefill at 32K: 4 * 128 * 32 * 32768 * 32769 / 2 = 8.796e12.
  CHECK(lower_bound_us(134217728, 4.0 * 128 * 32 * 32768 * 32769 / 2, peaks) == doctest::Approx(10995.4516));
  peaks.gemm_tflop_s = 0;
  CHECK(lower_bound_us(4e9, 1e15, peaks) == doctest::Approx(1000));
}

TEST_CASE("copies exceed twice the L2 cache together") {
  const std::size_t mib = 1 << 20;
  CHECK(copies_needed(128 * mib, 50 * mib) == 2);
  CHECK(copies_needed(50 * mib, 50 * mib) == 3);
  CHECK(copies_needed(16 * mib, 50 * mib) == 7);
  CHECK(copies_needed(mib, 50 * mib) == 16);  // the flush does the rest
}

TEST_CASE("what a step reads is what the account of the choice says, before and after it is called again") {
  const Trace trace = Trace::open(kShipped);
  const std::string kDecode = "decode", kPrefill = "prefill";
  for (const auto& [phase_name, gqa] : {std::pair(kDecode, "none"), {kDecode, "sum"}, {kPrefill, "none"}}) {
    CAPTURE(phase_name);
    CAPTURE(gqa);
    const ReplayPhase phase = phase_name == kDecode ? ReplayPhase::decode : ReplayPhase::prefill;
    TimedLayer layer(tiled(trace, 700), 700, 16, Dtype::bf16, cpu_device());
    const Cell cell = cell_of({{"select",
                                {{"name", phase == ReplayPhase::decode ? "quest" : "block_topk"},
                                 {"density", 0.25},
                                 {"gqa", gqa},
                                 {"dense_layers", Json::array()}}}});
    SelectBench bench(layer, cell, phase, 2);
    ChooseOptions counting;
    const auto counted = [&] { return bench.pipeline(1).choose_for(bench.span(), counting, [](const Selection&) {}); };
    const Choice before = counted();
    const SelectBench::Work work = bench.work();
    CHECK(work.reading.pairs == before.budget.realised_pairs);
    CHECK(work.charged.bytes > 0);
    if (phase == ReplayPhase::decode) CHECK(work.reading.slots == before.touched_tokens);
    CHECK(work.reading.slots <= 2 * 700);
    for (const auto& variants : {bench.steps(), bench.choices(), bench.indexings()})
      for (const auto& variant : variants) variant();
    int attended = 0;
    bench.with_attention([&](const Meter::Variants& variants) {
      for (const auto& variant : variants) variant(), ++attended;
    });
    CHECK(attended == 2);
    const Choice after = counted();
    REQUIRE(after.sets.size() == before.sets.size());
    for (std::size_t i = 0; i < after.sets.size(); ++i) CHECK(after.sets[i].slots == before.sets[i].slots);
  }
}

TEST_CASE("a decode step comes after the eviction that replay makes") {
  const Trace trace = Trace::open(kShipped);
  TimedLayer layer(tiled(trace, 400), 400, 16, Dtype::bf16, cpu_device());
  for (const char* name : {"snapkv", "h2o"}) {
    CAPTURE(name);
    const Cell cell = cell_of({{"evict", {{"name", name}, {"density", 0.25}}}});
    SelectBench bench(layer, cell, ReplayPhase::decode, 1);
    LayerPipeline replayed(roles_of(cell, ReplayPhase::decode), layer.setup(0), layer.cache(399), {});
    std::vector<float> out(4 * 399 * 64), lse(4 * 399);
    replayed.attend_to({Phase::prefill, -1, 0, 399}, nullptr, {}, out.data(), lse.data());
    replayed.observe_prefill(out, lse);
    replayed.evict_at_cut();
    replayed.append(399, 1);
    for (i32 h = 0; h < 2; ++h) {
      CHECK(bench.pipeline(0).cache().positions(h) == replayed.cache().positions(h));
      CHECK(replayed.cache().length(h) < 110);
    }
  }
}

TEST_CASE("attention alone gives the output of the whole step") {
  const Trace trace = Trace::open(kShipped);
  TimedLayer layer(tiled(trace, 300), 300, 16, Dtype::bf16, cpu_device());
  const Cell cell = cell_of({{"select", {{"name", "quest"}, {"density", 0.25}, {"dense_layers", Json::array()}}}});
  SelectBench bench(layer, cell, ReplayPhase::decode, 3);
  bench.steps()[2]();
  const std::vector<float> whole(layer.out(), layer.out() + 4 * 64);
  std::fill_n(layer.out(), 4 * 64, 0.f);
  bench.with_attention([](const Meter::Variants& variants) { variants.at(2)(); });
  CHECK(std::vector<float>(layer.out(), layer.out() + 4 * 64) == whole);
}

TEST_CASE("the pass: a row a cell and phase after dense attention, an error where one fails, seeds once") {
  const Trace trace = Trace::open(kShipped);
  const Json none = Json::array();
  const std::vector<Cell> cells = {
      cell_of({{"select", {{"name", "quest"}, {"density", 0.25}, {"dense_layers", none}}}}),
      cell_of({{"select", {{"name", "block_topk"}, {"density", 0.25}}}}),
      cell_of({{"evict", {{"name", "snapkv"}, {"density", 0.25}}}}),
      cell_of({{"evict", {{"name", "h2o"}, {"density", 0.25}}}}),
      cell_of({{"select", {{"name", "random"}, {"density", 0.25}}}}, 0),
      cell_of({{"select", {{"name", "random"}, {"density", 0.25}}}}, 1),
      cell_of({{"select", {{"name", "quest"}, {"dense_layers", none}}}})};  // without a budget it cannot rank
  FakeMeter fake;
  const CostResult result = pass(trace, cells, small_options(400), fake.meter);
  using Place = std::pair<ReplayPhase, int>;
  std::vector<Place> places;
  for (const CostRow& row : result.rows) places.emplace_back(row.phase, row.cell);
  const auto p = ReplayPhase::prefill, e = ReplayPhase::evict, d = ReplayPhase::decode;
  CHECK(places ==
        std::vector<Place>{{p, -1}, {p, 1}, {p, 4}, {e, 2}, {e, 3}, {d, -1}, {d, 0}, {d, 2}, {d, 3}, {d, 4}, {d, 6}});
  // 400 tokens * 2 KV heads * 256 bytes: two copies are more than 128 KiB.
  for (const CostRow& row : result.rows) {
    CAPTURE(row.cell);
    CAPTURE(name_of(row.phase));
    CAPTURE(row.error);
    CHECK(row.tokens == 400);
    CHECK(row.error.empty() == (row.cell != 6));
    if (!row.error.empty()) {
      CHECK(row.error.find("needs a budget") != std::string::npos);
      CHECK_FALSE(row.total);
      continue;
    }
    REQUIRE(row.total);
    if (row.phase != e) CHECK(row.total->median_us == (row.phase == d ? 2000 : 1000));
    CHECK(row.lower_bound_us == lower_bound_us(row.bytes, row.flops, fake.meter.peaks));
    CHECK(row.choice.has_value() == (row.phase != e && (row.cell == 0 || row.cell == 1 || row.cell == 4)));
    CHECK(row.index.has_value() == (row.phase == d && row.cell == 0));  // h2o has a side without index()
    CHECK(row.speedup == (row.phase == e || row.cell < 0 ? std::nullopt : std::optional<double>(1)));
  }
  CHECK(result.rows[5].bytes == 400 * 2 * 256);
  CHECK(result.rows[5].flops == 4.0 * 64 * 4 * 400);
  CHECK(result.rows[0].flops == 4.0 * 64 * 4 * (400 * 401 / 2));
  CHECK(result.rows[8].flags == std::vector<std::string>{"evicts-while-decoding"});
  // snapkv keeps a quarter of 399 tokens a head and decodes over those and the new one, at no cost of its own.
  CHECK(result.rows[7].flops == 4.0 * 64 * 4 * 101);
  CHECK(result.rows[7].bytes == 2 * 101 * 256);
  // h2o keeps a quarter of 399 tokens, and its decode step reads those and the new one.
  CHECK(result.rows[8].flops >= 4.0 * 64 * 4 * 101);
  CHECK(result.rows[8].bytes < result.rows[5].bytes);
  REQUIRE(result.memory.size() == 1);
  CHECK(result.memory[0].rfind("400 tokens: ", 0) == 0);
}

TEST_CASE("a length that does not fit is refused with both figures, and the next one is timed") {
  const Trace trace = Trace::open(kShipped);
  FakeMeter fake;
  CostOptions options = small_options(100000);
  options.shape.tokens = {100000, 200};
  options.phases = {ReplayPhase::decode};
  fake.free_bytes = std::size_t{64} << 20;
  const std::vector<Cell> cells = {
      cell_of({{"select", {{"name", "quest"}, {"density", 0.25}, {"dense_layers", Json::array()}}}})};
  const CostResult result = pass(trace, cells, options, fake.meter);
  REQUIRE(result.rows.size() == 3);
  CHECK(result.rows[0].tokens == 100000);
  CHECK(result.rows[0].error.find("64.0 MiB free") != std::string::npos);
  CHECK(result.rows[0].error.find("GiB (largest: ") != std::string::npos);
  CHECK(result.rows[2].tokens == 200);
  CHECK(result.rows[2].total.has_value());
}

TEST_CASE("times need a GPU") {
  CostRun run;
  run.device = cpu_device();
  const CostResult result = time_cells(Trace::open(kShipped), {}, small_options(200), run);
  REQUIRE(result.rows.size() == 1);
  CHECK(result.rows[0].error.find("GPU") != std::string::npos);
}
