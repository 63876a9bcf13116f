// The example plug-in that brings its own CUDA kernels: its scores against the CPU's loops, directly and inside a CUDA
// graph.
#include <cmath>

#include "lacuna/strategy/registry.hpp"
#include "stage.hpp"

namespace strategies_test {
namespace {

constexpr i32 kLayer = 9;

const Registry& registry() {
  static const Registry loaded = [] {
    Registry r;
    r.load(LACUNA_SIMHASH);
    return r;
  }();
  return loaded;
}

struct Case {
  Phase phase;
  Purpose purpose;
  i64 cached;
};
/// Lengths that are no multiple of a page, of a block's tokens or of a warp's.
constexpr Case kCases[] = {
    {Phase::decode, Purpose::select, 1},
    {Phase::decode, Purpose::select, 67},
    {Phase::decode, Purpose::select, 1999},
    {Phase::prefill, Purpose::evict, 1537},
};

Outcome play(const std::shared_ptr<Device>& device, const Trace& trace, int words, const Case& c, bool in_graph) {
  const Resolved settings = resolve(registry(), Json{{"name", "simhash"}, {"words", words}}, "test", ".",
                                    c.purpose == Purpose::evict ? RoleKind::evict : RoleKind::select);
  Stage stage(device, settings, trace, kLayer, c.phase, c.purpose, c.cached);
  if (in_graph) return stage.index_and_score_in_graph();
  stage.index();
  return stage.score();
}

}  // namespace

TEST_CASE("GPU: the kernels of the example plug-in give the scores of its loops, also in a CUDA graph") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  for (const int words : {1, 3, 4, 16})
    for (const Case& c : kCases) {
      CAPTURE(words);
      CAPTURE(c.cached);
      const Outcome cpu = play(cpu_device(), trace, words, c, false),
                    gpu = play(kv_test::test_device(), trace, words, c, false);
      CHECK(play(kv_test::test_device(), trace, words, c, true) == gpu);
      REQUIRE(gpu.scores.size() == cpu.scores.size());
      // A bit is the sign of a dot product, whose rounding differs: a bit of a key, or of a query, may be another one.
      std::size_t entries = 0, other = 0, far = 0, distinct = 0;
      for (std::size_t row = 0; row < cpu.scores.size(); ++row) {
        const std::vector<float>&a = gpu.scores[row], &b = cpu.scores[row];
        REQUIRE(a.size() == b.size());
        for (std::size_t i = 0; i < b.size(); ++i) {
          ++entries;
          other += a[i] != b[i];
          far += !(std::abs(a[i] - b[i]) <= 2.f);
          distinct += b[i] != b[0];
        }
      }
      CHECK(far == 0);
      CHECK(static_cast<double>(other) <= .001 * static_cast<double>(entries));
      CHECK((c.cached == 1 || 2 * distinct > entries));
    }
}

}  // namespace strategies_test
