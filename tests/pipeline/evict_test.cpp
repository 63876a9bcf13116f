// Eviction: what is kept, what it frees, and how it goes on while decoding.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

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
