// Every strategy of the build on the shipped trace: what its loops give on the GPU equals what they give on the CPU.
#include <cmath>
#include <functional>
#include <string>

#include "lacuna/base/error.hpp"
#include "lacuna/strategy/registry.hpp"
#include "stage.hpp"

namespace strategies_test {
namespace {

constexpr double kTie = 1e-4;   // relative: scores nearer than this may change places
constexpr double kMost = 0.01;  // of rows or entries that may differ by a tie

const Registry& registry() {
  static const Registry loaded = [] {
    Registry r;
    r.load_standard({});
    return r;
  }();
  return loaded;
}
const Trace& trace() {
  static const Trace opened = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  return opened;
}

Resolved resolved(const StrategyType& type, RoleKind role) {
  Json given{{"name", type.name()}};
  if (type.entry().wrapper) given["base"] = "quest";
  return resolve(registry(), given, "test", ".", role);
}

/// The k best of a row, ties to the lower index.
std::vector<i32> best(const std::vector<float>& row, std::size_t k) {
  std::vector<i32> order;
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (row[i] > -std::numeric_limits<float>::infinity()) order.push_back(static_cast<i32>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](i32 a, i32 b) { return row[static_cast<std::size_t>(a)] > row[static_cast<std::size_t>(b)]; });
  order.resize(std::min(k, order.size()));
  std::sort(order.begin(), order.end());
  return order;
}

void compare_scores(const Outcome& gpu, const Outcome& cpu) {
  REQUIRE(gpu.scores.size() == cpu.scores.size());
  std::size_t far = 0, finite = 0, other_choice = 0;
  for (std::size_t row = 0; row < cpu.scores.size(); ++row) {
    const std::vector<float>&a = gpu.scores[row], &b = cpu.scores[row];
    double largest = 0;
    for (const float x : b) largest = std::max(largest, std::isfinite(x) ? std::abs(static_cast<double>(x)) : 0.0);
    for (std::size_t i = 0; i < b.size(); ++i) {
      finite += std::isfinite(b[i]);
      if (a[i] == b[i]) continue;
      const double scale =
          std::max({std::abs(static_cast<double>(a[i])), std::abs(static_cast<double>(b[i])), 1e-3 * largest});
      far += !(std::abs(static_cast<double>(a[i]) - b[i]) <= kTie * scale);
    }
    other_choice += best(a, a.size() / 4 + 1) != best(b, b.size() / 4 + 1);
  }
  CHECK(far == 0);
  CHECK((cpu.scores.empty() || finite > 0));
  CHECK(static_cast<double>(other_choice) <= kMost * static_cast<double>(cpu.scores.size()));
}

void compare_lists(const std::vector<std::vector<i32>>& gpu, const std::vector<std::vector<i32>>& cpu) {
  REQUIRE(gpu.size() == cpu.size());
  std::size_t entries = 0, common = 0;
  for (std::size_t row = 0; row < cpu.size(); ++row) {
    std::vector<i32> a = gpu[row], b = cpu[row], both;
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    entries += a.size() + b.size();
    common += 2 * both.size();
  }
  CHECK(static_cast<double>(entries - common) <= kMost * static_cast<double>(entries));
}

void compare_weights(const Outcome& gpu, const Outcome& cpu) {
  std::size_t far = 0;
  for (std::size_t row = 0; row < cpu.token_weights.size(); ++row) {
    std::map<i32, float> weight;
    for (std::size_t i = 0; i < cpu.tokens[row].size(); ++i) weight[cpu.tokens[row][i]] = cpu.token_weights[row][i];
    for (std::size_t i = 0; i < gpu.tokens[row].size(); ++i) {
      const auto it = weight.find(gpu.tokens[row][i]);
      far += it != weight.end() &&
             !(std::abs(it->second - gpu.token_weights[row][i]) <= kTie * (1 + std::abs(it->second)));
    }
  }
  CHECK(far == 0);
}

/// Plays on the CPU, on the GPU and on the GPU again. False where the strategy asks for what the stage has not (a file,
/// other layers, rows before RoPE, room for extra tokens): tests/replay compares those on both backends, in a whole
/// replay.
bool compare(const StrategyType& type, RoleKind role, Phase phase, Purpose purpose,
             const std::function<Outcome(Stage&)>& play) {
  if (type.entry().needs != 0) return false;
  constexpr i32 kLayer = 9;
  const Resolved settings = resolved(type, role);
  const i64 cached = trace().info().prefill_tokens;
  const auto on = [&](const std::shared_ptr<Device>& device) {
    Stage stage(device, settings, trace(), kLayer, phase, purpose, cached);
    return play(stage);
  };
  Outcome cpu;
  try {
    cpu = on(cpu_device());
  } catch (const Error& e) {
    if (std::string(e.what()).find("cannot be had here") == std::string::npos) throw;
    return false;
  }
  const Outcome gpu = on(kv_test::test_device()), again = on(kv_test::test_device());
  CHECK(gpu == again);
  compare_scores(gpu, cpu);
  compare_lists(gpu.pieces, cpu.pieces);
  compare_lists(gpu.tokens, cpu.tokens);
  compare_weights(gpu, cpu);
  CHECK(gpu.rules == cpu.rules);
  CHECK(gpu.targets == cpu.targets);
  return true;
}

Outcome select(Stage& stage, const sdk::Entry& entry) {
  stage.index();
  if (entry.refine) return stage.refine();
  return entry.mark ? stage.mark() : stage.score();
}

void select_all(sdk::Phases in, Phase phase) {
  int compared = 0;
  for (const StrategyType* type : registry().all()) {
    if (!type->can_select() || !type->in_phase(in)) continue;
    const std::string name = type->name();
    CAPTURE(name);
    compared +=
        compare(*type, RoleKind::select, phase, Purpose::select, [&](Stage& s) { return select(s, type->entry()); });
  }
  CHECK(compared > 4);
}

}  // namespace

TEST_CASE("GPU: every strategy that selects in prefill gives the CPU's choice") {
  select_all(sdk::kPrefill, Phase::prefill);
}

TEST_CASE("GPU: every strategy that selects in decode gives the CPU's choice") {
  select_all(sdk::kDecode, Phase::decode);
}

TEST_CASE("GPU: every strategy that evicts gives the CPU's choice") {
  int compared = 0;
  for (const StrategyType* type : registry().all()) {
    if (!type->can_evict() || type->entry().wrapper) continue;  // the stage has no base to rank by
    const std::string name = type->name();
    CAPTURE(name);
    compared += compare(*type, RoleKind::evict, Phase::prefill, Purpose::evict, [&](Stage& s) {
      s.attended();
      s.index();
      return type->entry().retain ? s.retain() : s.score();
    });
  }
  CHECK(compared > 4);
}

TEST_CASE("GPU: every strategy that allocates rows gives the CPU's targets") {
  int compared = 0;
  for (const StrategyType* type : registry().all()) {
    if (!type->entry().allocate_rows) continue;
    const std::string name = type->name();
    CAPTURE(name);
    compared +=
        compare(*type, RoleKind::allocate, Phase::prefill, Purpose::evict, [](Stage& s) { return s.allocate(); });
  }
  CHECK(compared >= 3);
}

}  // namespace strategies_test
