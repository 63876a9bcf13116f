// Eviction: what is kept, what it frees, and how it goes on while decoding.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "lacuna/replay/replay.hpp"
#include "lacuna/strategy/registry.hpp"
#include "pipeline/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

const char* const kShipped = LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors";

const Registry& built_ins() {
  static const Registry registry = [] {
    Registry r;
    r.load_directory(LACUNA_PLUGIN_DIR);
    return r;
  }();
  return registry;
}

Resolved built_in(const Json& table, RoleKind role) { return resolve(built_ins(), table, "test", "", role); }

std::vector<i32> best(const std::vector<float>& score, i64 k) {
  std::vector<i32> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) {
    return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(k));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<i32> joined(std::vector<i32> a, const std::vector<i32>& b) {
  a.insert(a.end(), b.begin(), b.end());
  std::sort(a.begin(), a.end());
  a.erase(std::unique(a.begin(), a.end()), a.end());
  return a;
}

/// Hands every other head three quarters of the layer's tokens, the rest a quarter.
struct Uneven : sdk::Strategy {
  static sdk::Info info() {
    sdk::Info i{};
    i.name = "uneven", i.summary = i.rule = i.paper = "-";
    i.phases = sdk::kDecode | sdk::kEvict;
    return i;
  }
  void allocate_rows(sdk::Context&, const sdk::Scores*, sdk::Budget& b) override {
    for (i64 r = 0; r + 1 < b.rows.count(); r += 2) {
      const i64 both = b.tokens[r] + b.tokens[r + 1];
      b.tokens[r] = b.pairs[r] = both * 3 / 4;
      b.tokens[r + 1] = b.pairs[r + 1] = both - b.tokens[r];
    }
  }
};

/// Looks at the scores after it has used memory of its own.
struct Watcher : sdk::Strategy {
  static inline std::vector<float> seen;
  static constexpr i64 kRoom = 4096;

  static sdk::Info info() {
    sdk::Info i{};
    i.name = "watcher";
    i.summary = i.paper = i.rule = "-";
    i.phases = sdk::kEvict;
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override { p.workspace_bytes = kRoom * 4; }
  void allocate_rows(sdk::Context& c, const sdk::Scores* s, sdk::Budget&) override {
    c.workspace<float>(kRoom);
    seen.assign(s->value, s->value + s->rows.count() * s->stride);
  }
};

/// Ranks as its base does, and keeps what it was given.
struct Relay : sdk::Strategy {
  static inline std::vector<float> seen;
  static inline std::vector<i32> part;  // of each head; empty: everything

  static sdk::Info info() {
    sdk::Info i{};
    i.name = "relay";
    i.summary = i.paper = i.rule = "-";
    i.phases = sdk::kEvict;
    i.wrapper = 1;
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override { p.per_query_head = 0; }
  void score(sdk::Context& c, sdk::Scores& s) override {
    if (part.empty()) {
      c.base_scores(s);
    } else {
      const i64 n = static_cast<i64>(part.size());
      std::vector<i32> slots, count(static_cast<std::size_t>(s.rows.count()), static_cast<i32>(n));
      for (i64 r = 0; r < s.rows.count(); ++r) slots.insert(slots.end(), part.begin(), part.end());
      c.base_scores_of({count.data(), slots.data(), n, part.back() + 1}, s);
    }
    seen.assign(s.value, s.value + s.rows.count() * s.stride);
  }
};

/// Doubles the values of what is kept and drops key channels 1 and 2 of all but the last five tokens.
struct Doubler : sdk::Strategy {
  static inline float factor = 2;

  static sdk::Info info() {
    sdk::Info i{};
    i.name = "doubler";
    i.summary = i.paper = i.rule = "-";
    i.phases = sdk::kEvict;
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override { p.per_query_head = 0; }
  void score(sdk::Context&, sdk::Scores& s) override {
    for (i64 r = 0; r < s.rows.count(); ++r)
      for (i64 u = 0; u < s.units; ++u) s.value[r * s.stride + u] = scripted_score(r, 0, u);
  }
  void rewrite(sdk::Context&, const sdk::Rewrite& w) override {
    for (i64 r = 0; r < w.rows; ++r) {
      for (i64 i = 0; i < w.kept_count[r]; ++i)
        for (i64 c = 0; c < w.head_dim; ++c) w.v[(r * w.slots + w.kept[r * w.slots + i]) * w.head_dim + c] *= factor;
      w.channels_dropped_until[r] = static_cast<i32>(w.slots) - 5;
      w.drop_channel[r * w.head_dim + 1] = w.drop_channel[r * w.head_dim + 2] = 1;
    }
  }
};

/// As `resolved`, over a base.
Resolved over(Resolved wrapper, Resolved base) {
  wrapper.base = std::make_shared<Resolved>(std::move(base));
  return wrapper;
}

}  // namespace

TEST_CASE("one cut keeps the best of the group's mean, or whatever any head of it ranks") {
  Bed bed(generated(6, 2, 64, 211, 1));
  script = {1, 1};
  const i64 keep = round_half_up(0.3 * 211);
  for (const char* gqa : {"mean", "union"}) {
    const Resolved evict = resolved(type_of<Scripted>(), density(0.3), {{"gqa", gqa}});
    LayerPipeline pipeline = bed.pipeline({nullptr, &evict, nullptr}, 211);
    const Eviction e = pipeline.evict_at_cut();
    for (i64 h = 0; h < 2; ++h) {
      std::vector<float> mean(211);
      std::vector<i32> united;
      for (i64 g = 0; g < 3; ++g) {
        std::vector<float> of_head(211);
        for (i64 j = 0; j < 211; ++j) of_head[static_cast<std::size_t>(j)] = scripted_score(h * 3 + g, 0, j);
        for (std::size_t j = 0; j < 211; ++j) mean[j] += of_head[j];
        united = joined(united, best(of_head, keep));
      }
      CHECK(e.kept[static_cast<std::size_t>(h)] == (gqa == std::string("mean") ? best(mean, keep) : united));
      CHECK(pipeline.cache().positions(static_cast<i32>(h)) == e.kept[static_cast<std::size_t>(h)]);
    }
  }
}

TEST_CASE("an allocator sees the scores of the groups, whatever memory it uses") {
  Bed bed(generated(6, 2, 64, 211, 1));
  script = {1, 1};
  const Resolved evict = resolved(type_of<Scripted>(), density(0.3), {{"gqa", "mean"}}),
                 watcher = resolved(type_of<Watcher>(), {});
  bed.pipeline({nullptr, &evict, &watcher}, 211).evict_at_cut();
  REQUIRE(Watcher::seen.size() == 2 * 211);
  for (i64 h = 0; h < 2; ++h) {
    std::vector<float> mean(211);
    for (i64 g = 0; g < 3; ++g)
      for (i64 j = 0; j < 211; ++j) mean[static_cast<std::size_t>(j)] += scripted_score(h * 3 + g, 0, j);
    for (std::size_t j = 0; j < 211; ++j)
      CHECK(Watcher::seen[static_cast<std::size_t>(h) * 211 + j] == doctest::Approx(mean[j] / 3));
  }
}

TEST_CASE("forced tokens are kept inside the target, and one that they exceed is marked floor") {
  Bed bed(generated(2, 2, 64, 100, 1));
  script = {1, 1};
  const Resolved evict = resolved(type_of<Scripted>(), density(0.3), {{"gqa", "mean"}, {"sinks", 4}, {"recent", 10}});
  const Eviction e = bed.pipeline({nullptr, &evict, nullptr}, 100).evict_at_cut();
  for (const auto& kept : e.kept) {
    CHECK(kept.size() == 30);
    for (i32 j = 0; j < 100; ++j)
      if (j < 4 || j >= 90) CHECK(std::binary_search(kept.begin(), kept.end(), j));
  }
  CHECK_FALSE(e.floor);
  const Resolved tight = resolved(type_of<Scripted>(), density(0.1), {{"gqa", "mean"}, {"sinks", 4}, {"recent", 10}});
  CHECK(bed.pipeline({nullptr, &tight, nullptr}, 100).evict_at_cut().floor);
}

TEST_CASE("h2o holds every KV head at the capacity of the cut while decoding") {
  Bed bed(Trace::open(kShipped), 9);
  const Resolved h2o = built_in({{"name", "h2o"}, {"density", 0.1}}, RoleKind::evict);
  LayerPipeline pipeline = bed.pipeline({nullptr, &h2o, nullptr}, bed.prompt);
  const std::vector<float> out = bed.layer.dense_out(0, bed.prompt), lse = bed.layer.dense_lse(0, bed.prompt);
  pipeline.observe_prefill(out, lse);
  const i64 capacity = round_half_up(0.1 * static_cast<double>(bed.prompt));
  CHECK(pipeline.evict_at_cut().target_tokens == capacity);
  for (i64 i = 0; i < 12; ++i) {
    pipeline.step(bed.prompt + i, i);
    for (i32 h = 0; h < 3; ++h) {
      CHECK(pipeline.cache().length(h) == capacity);
      CHECK(pipeline.cache().positions(h).back() == bed.prompt + i);
    }
  }
}

TEST_CASE("uneven heads keep the layer's capacity while decoding") {
  Bed bed(generated(4, 2, 64, 400, 20));
  const Resolved h2o = built_in({{"name", "h2o"}, {"density", 0.25}}, RoleKind::evict),
                 uneven = resolved(type_of<Uneven>(), {});
  LayerPipeline pipeline = bed.pipeline({nullptr, &h2o, &uneven}, bed.prompt);
  const std::vector<float> out = bed.layer.dense_out(0, bed.prompt), lse = bed.layer.dense_lse(0, bed.prompt);
  pipeline.observe_prefill(out, lse);
  pipeline.evict_at_cut();
  for (i64 i = 0; i < 20; ++i) {
    CHECK(pipeline.cache().length(0) == 150);
    CHECK(pipeline.cache().length(1) == 50);
    pipeline.step(bed.prompt + i, i);
  }
}

TEST_CASE("a selection beside an eviction plans for the decoding to come") {
  Bed bed(generated(2, 2, 64, 300, 1));
  const Resolved evict = built_in({{"name", "snapkv"}, {"density", 0.5}}, RoleKind::evict),
                 select = built_in({{"name", "random"}, {"density", 0.3}}, RoleKind::select);
  LayerPipeline pipeline = bed.pipeline({&select, &evict, nullptr}, 300);
  pipeline.evict_at_cut();
  const Step step = pipeline.step(300, 0);
  CHECK(pipeline.select()->plan().q_tile == 1);
  CHECK(step.choice.kv_block == 16);  // random's page in decode; its block in prefill is 64
}

TEST_CASE("positions = compacted reads keys and queries at their slots") {
  constexpr i64 kPrompt = 300, kSteps = 5, kDim = 64;
  Bed bed(generated(4, 2, kDim, kPrompt, kSteps));
  const Resolved evict =
      built_in({{"name", "streaming_llm"}, {"tokens", 50}, {"positions", "compacted"}}, RoleKind::evict);
  LayerPipeline pipeline = bed.pipeline({nullptr, &evict, nullptr}, kPrompt);
  pipeline.evict_at_cut();
  const LayerTensors& t = bed.layer.tensors();
  const auto *k = static_cast<const float*>(t.k.data), *v = static_cast<const float*>(t.v.data),
             *q = static_cast<const float*>(t.q.data);
  const i64 tokens = kPrompt + kSteps;
  const auto at_slot = [&](const float* row, i64 position, i64 slot) {
    std::vector<float> x(row, row + kDim);
    bed.setup.rope->unrotate(x.data(), static_cast<double>(position));
    bed.setup.rope->rotate(x.data(), static_cast<double>(slot));
    return x;
  };
  for (i64 i = 0; i < kSteps; ++i) {
    const Step step = pipeline.step(kPrompt + i, i);
    std::vector<i64> held;
    for (i64 p = 0; p <= kPrompt + i; ++p)
      if (p < 4 || p >= kPrompt - 46) held.push_back(p);
    for (i64 h = 0; h < 4; ++h) {
      const i64 kv = h / 2;
      const std::vector<float> query =
          at_slot(q + (h * tokens + kPrompt + i) * kDim, kPrompt + i, static_cast<i64>(held.size()) - 1);
      std::vector<double> weight, out(kDim);
      double sum = 0;
      for (std::size_t s = 0; s < held.size(); ++s) {
        const std::vector<float> key = at_slot(k + (kv * tokens + held[s]) * kDim, held[s], static_cast<i64>(s));
        double logit = 0;
        for (std::size_t c = 0; c < kDim; ++c) logit += static_cast<double>(query[c]) * key[c];
        weight.push_back(std::exp(logit * bed.setup.layer.softmax_scale));
        sum += weight.back();
      }
      for (std::size_t s = 0; s < held.size(); ++s)
        for (i64 c = 0; c < kDim; ++c)
          out[static_cast<std::size_t>(c)] += weight[s] / sum * v[(kv * tokens + held[s]) * kDim + c];
      CHECK(step.lse[static_cast<std::size_t>(h)] == doctest::Approx(std::log(sum)).epsilon(1e-5));
      for (i64 c = 0; c < kDim; ++c)
        CHECK(std::abs(step.out[static_cast<std::size_t>(h * kDim + c)] - out[static_cast<std::size_t>(c)]) < 1e-4);
    }
  }
}

TEST_CASE("duo: named KV heads read and keep everything, the others sinks and a window") {
  Bed bed(generated(4, 2, 64, 300, 2));
  const Resolved duo =
      built_in({{"name", "duo"}, {"sinks", 4}, {"recent", 20}, {"classes", {{"2", {1}}}}}, RoleKind::allocate);
  script = {16, 64};
  const Choice choice = bed.prefill(resolved(type_of<Scripted>(), density(0.5)), {true}, &duo);
  for (i64 h = 0; h < 4; ++h)
    for (i64 tile = 0; tile < choice.tiles(); ++tile)
      for (i64 q = tile * 64; q < std::min<i64>(tile * 64 + 64, 300); ++q) {
        std::vector<i32> expected;
        for (i32 j = 0; j <= q; ++j)
          if (h >= 2 || j < 4 || q - j < 20) expected.push_back(j);
        REQUIRE(choice.sets[static_cast<std::size_t>(h * choice.tiles() + tile)].cells(q, q + 1) == expected);
      }
  LayerPipeline pipeline = bed.pipeline({nullptr, nullptr, &duo}, 300);
  pipeline.evict_at_cut();
  CHECK(pipeline.cache().length(0) == 24);
  CHECK(pipeline.cache().length(1) == 300);
}

TEST_CASE("evicting 90 % frees its pages and its steps' bytes, at either cut, to the last step") {
  constexpr double kSaved = 0.85;
  for (const char* cut : {"before_question", "end"}) {
    Bed bed(Trace::open(kShipped), 18);
    const Resolved evict = built_in({{"name", "snapkv"}, {"density", 0.1}, {"cut", cut}}, RoleKind::evict);
    const i64 at = cut_of(bed.trace.info(), cut), tokens = bed.layer.tokens();
    LayerPipeline pipeline = bed.pipeline({nullptr, &evict, nullptr}, at);
    KvCache dense = bed.layer.fork(tokens);
    const double dense_pages = static_cast<double>(dense.pages());
    dense = bed.layer.fork(at);  // its pages go back
    pipeline.evict_at_cut();
    if (at < bed.prompt) pipeline.append(at, bed.prompt - at);
    for (i64 i = 0; bed.prompt + i < tokens; ++i) {
      const Step step = pipeline.step(bed.prompt + i, i);
      CHECK(static_cast<double>(pipeline.cache().pages()) <= (1 - kSaved) * dense_pages);
      CHECK(step.choice.touched_tokens <= (1 - kSaved) * static_cast<double>((bed.prompt + i + 1) * 3));
    }
    dense = pipeline.cache().fork();
    bed.layer.release_parents();
    CHECK(bed.layer.pool().pages_in_use() == pipeline.cache().pages());
  }
}

TEST_CASE("a wrapper gets its base's scores as they would be ranked: of groups, forced tokens first") {
  Bed bed(generated(6, 2, 64, 211, 1));
  script = {1, 1};
  Relay::part.clear();
  const Json settings = {{"gqa", "mean"}, {"sinks", 2}, {"recent", 3}};
  const Resolved relay =
      over(resolved(type_of<Relay>(), density(0.3), {{"gqa", "mean"}}), resolved(type_of<Scripted>(), {}, settings));
  const Resolved alone = resolved(type_of<Scripted>(), density(0.3), settings);
  const Eviction e = bed.pipeline({nullptr, &relay, nullptr}, 211).evict_at_cut();
  CHECK(e.kept == bed.pipeline({nullptr, &alone, nullptr}, 211).evict_at_cut().kept);
  for (i64 h = 0; h < 2; ++h)
    for (i64 j = 0; j < 211; ++j) {
      const float found = Relay::seen[static_cast<std::size_t>(h * 211 + j)];
      float mean = 0;
      for (i64 g = 0; g < 3; ++g) mean += scripted_score(h * 3 + g, 0, j) / 3;
      if (j < 2 || j >= 208)
        CHECK(std::isinf(found));
      else
        CHECK(found == doctest::Approx(mean));
    }
  const Resolved each = over(resolved(type_of<Relay>(), density(0.3), {{"gqa", "mean"}}),
                             resolved(type_of<Scripted>(), {}, {{"gqa", "union"}}));
  CHECK_THROWS_WITH_AS(bed.pipeline({nullptr, &each, nullptr}, 211).evict_at_cut(), doctest::Contains("gqa = union"),
                       lacuna::Error);
}

TEST_CASE("a base that chooses explicitly scores what it keeps") {
  Bed bed(generated(4, 2, 64, 120, 1));
  Relay::part.clear();
  const Resolved base = built_in({{"name", "streaming_llm"}}, RoleKind::evict);
  const Resolved relay = over(resolved(type_of<Relay>(), density(0.25), {{"gqa", "mean"}}), base);
  const Eviction e = bed.pipeline({nullptr, &relay, nullptr}, 120).evict_at_cut();
  std::vector<i32> expected;
  for (i32 j = 0; j < 120; ++j)
    if (j < 4 || j >= 94) expected.push_back(j);
  for (const auto& kept : e.kept) CHECK(kept == expected);
}

TEST_CASE("scores of a subset are those of a cache that holds nothing else") {
  Bed bed(generated(4, 2, 64, 90, 1));
  script = {1, 1};
  Relay::part = {1, 2, 40, 41, 77};
  const Resolved relay = over(resolved(type_of<Relay>(), {BudgetSpec::Kind::tokens, 3, false}, {{"gqa", "mean"}}),
                              resolved(type_of<Scripted>(), {}, {{"gqa", "mean"}, {"recent", 1}}));
  LayerPipeline pipeline = bed.pipeline({nullptr, &relay, nullptr}, 90);
  const Eviction e = pipeline.evict_at_cut();
  for (i64 h = 0; h < 2; ++h) {
    CHECK(e.kept[static_cast<std::size_t>(h)].size() == 3);
    for (i32 j = 0; j < 90; ++j) {
      const float found = Relay::seen[static_cast<std::size_t>(h * 90 + j)];
      const auto at = std::find(Relay::part.begin(), Relay::part.end(), j);
      const i64 slot = at - Relay::part.begin();
      if (at == Relay::part.end())
        CHECK(found == -std::numeric_limits<float>::infinity());
      else if (slot == 4)
        CHECK(found == std::numeric_limits<float>::infinity());
      else
        CHECK(found == doctest::Approx((scripted_score(h * 2, 0, slot) + scripted_score(h * 2 + 1, 0, slot)) / 2));
    }
  }
  Relay::part.clear();
}

TEST_CASE("what a strategy rewrites is cached, and channels that it drops are not counted") {
  Bed bed(generated(4, 2, 64, 100, 2));
  Doubler::factor = 2;
  const Resolved doubler = resolved(type_of<Doubler>(), density(0.3), {{"gqa", "mean"}});
  LayerPipeline pipeline = bed.pipeline({nullptr, &doubler, nullptr}, 100);
  const Eviction e = pipeline.evict_at_cut();
  const LayerTensors& t = bed.layer.tensors();
  const auto *k = static_cast<const float*>(t.k.data), *v = static_cast<const float*>(t.v.data);
  const sdk::Paged kv = pipeline.cache().view();
  double dropped = 0;
  for (i32 h = 0; h < 2; ++h) {
    const auto& kept = e.kept[static_cast<std::size_t>(h)];
    REQUIRE(pipeline.cache().positions(h) == kept);
    i64 wrong = 0;
    for (i64 i = 0; i < static_cast<i64>(kept.size()); ++i) {
      const i64 slot = kept[static_cast<std::size_t>(i)];
      dropped += slot < 95 ? 1. / 64 : 0;
      for (i64 c = 0; c < 64; ++c) {
        const bool gone = slot < 95 && (c == 1 || c == 2);
        wrong += kv.key(h, i, c) != (gone ? 0.f : k[(h * 102 + slot) * 64 + c]);
        wrong += kv.value(h, i, c) != 2 * v[(h * 102 + slot) * 64 + c];
      }
    }
    CHECK(wrong == 0);
  }
  CHECK(e.dropped_tokens == doctest::Approx(dropped));
  CHECK(static_cast<double>(pipeline.cache().token_bytes()) ==
        doctest::Approx((e.kept_tokens - e.dropped_tokens) * 2 * 64 * 4));
  const KvCache parent = bed.layer.fork(100);
  CHECK(parent.view().value(0, 0, 0) == v[0]);

  Doubler::factor = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH_AS(bed.pipeline({nullptr, &doubler, nullptr}, 100).evict_at_cut(),
                       doctest::Contains("role rewrite"), lacuna::Error);
}
