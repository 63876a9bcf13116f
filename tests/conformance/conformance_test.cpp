// Every strategy of the build passes the suite without being named; every way to break a rule is caught by that rule,
// and costs only its own rows.
#include <doctest/doctest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lacuna/replay/conformance.hpp"
#include "lacuna/replay/replay.hpp"

using namespace lacuna;

namespace {

Registry registry_with_bad() {
  Registry r;
  r.load_directory(LACUNA_PLUGIN_DIR);
  r.load(LACUNA_BAD_PLUGIN);
  return r;
}

struct Fault {
  const char *strategy, *rule, *text;  // found in the detail
};

constexpr Fault kFaults[] = {
    {"bad_index", "contract", "out of range"},
    {"bad_duplicate", "contract", "listed twice"},
    {"bad_nan", "contract", "NaN"},
    {"bad_refine", "contract", "out of range"},
    {"bad_rows", "contract", "allocate_rows"},
    {"bad_kept", "contract", "out of range"},
    {"bad_budget", "budget", "floor"},
    {"bad_poison", "poison", "reads other tokens"},
    {"bad_restless", "determinism", "run again"},
    {"bad_seed", "determinism", "another seed"},
    {"bad_dense", "dense point", "is not dense"},
    {"bad_nested", "nested", "larger budget"},
    {"bad_side", "side data", "from scratch"},
    {"bad_layers", "allocation", "layers' mean"},
    {"throws_plan", "contract", "role plan: thrown on purpose"},
    {"throws_score", "contract", "role score: thrown on purpose"},
    {"throws_mark", "contract", "role mark"},
    {"throws_index", "contract", "role index: thrown on purpose"},
    {"throws_refine", "contract", "role refine: thrown on purpose"},
    {"throws_retain", "contract", "role retain: thrown on purpose"},
    {"throws_attended", "contract", "role attended: thrown on purpose"},
    {"throws_allocate_rows", "contract", "role allocate_rows: thrown on purpose"},
    {"throws_allocate_layers", "contract", "role allocate_layers: thrown on purpose"},
};

Trace small_trace() {
  SyntheticSpec spec;
  spec.prefill_tokens = 200;
  spec.decode_tokens = 6;
  spec.captured_layers = {1, 2};
  return synthetic_trace(spec);
}

Cell cell_of(const Registry& registry, RoleKind role, const Json& table) {
  Cell c;
  c.label = table["name"].get<std::string>();
  (role == RoleKind::select ? c.select : c.evict) = resolve(registry, table, "test", "", role);
  return c;
}

/// Rows of equal content, wherever their cells stand in the list.
void check_same(const Row& a, const Row& b) {
  CHECK(a.status == b.status);
  CHECK(a.layer == b.layer);
  CHECK(a.phase == b.phase);
  CHECK(a.marks == b.marks);
  CHECK(a.realised_head == b.realised_head);
  CHECK(a.realised_union == b.realised_union);
  REQUIRE(a.metrics.size() == b.metrics.size());
  for (const auto& [name, stats] : a.metrics) {
    const LayerStats& other = b.metrics.at(name);
    REQUIRE(stats.cells.size() == other.cells.size());
    for (std::size_t i = 0; i < stats.cells.size(); ++i) {
      CHECK(stats.cells[i].count == other.cells[i].count);
      CHECK(stats.cells[i].sum == other.cells[i].sum);
      CHECK(stats.cells[i].histogram == other.cells[i].histogram);
    }
  }
}

}  // namespace

TEST_CASE("every strategy of the build conforms") {
  Registry registry;
  registry.load_directory(LACUNA_PLUGIN_DIR);
  CHECK(registry.failures().empty());
  REQUIRE_FALSE(registry.all().empty());
  for (const StrategyType* type : registry.all()) {
    const std::vector<Finding> findings = check_strategy(registry, *type);
    CHECK_FALSE(findings.empty());
    for (const Finding& f : findings) {
      CAPTURE(f.strategy);
      CAPTURE(f.rule);
      CAPTURE(f.detail);
      CHECK(f.passed);
    }
  }
}

TEST_CASE("each broken rule is caught by its name") {
  const Registry registry = registry_with_bad();
  for (const Fault& fault : kFaults) {
    const std::vector<Finding> findings = check_strategy(registry, registry.find(fault.strategy));
    const auto found =
        std::find_if(findings.begin(), findings.end(), [&](const Finding& f) { return f.rule == fault.rule; });
    REQUIRE(found != findings.end());
    CAPTURE(fault.strategy);
    CAPTURE(fault.rule);
    CHECK_FALSE(found->passed);
    CAPTURE(found->detail);
    CHECK(found->detail.find(fault.text) != std::string::npos);
  }
  int of_library = 0;
  for (const StrategyType* type : registry.all())
    of_library += type->library().find(LACUNA_BAD_PLUGIN) != std::string::npos;
  CHECK(of_library == static_cast<int>(std::size(kFaults)));
}

TEST_CASE("a strategy that fails costs its own rows and no others") {
  const Registry registry = registry_with_bad();
  const Trace trace = small_trace();
  const std::vector<Cell> good = {cell_of(registry, RoleKind::select, {{"name", "random"}, {"density", 0.3}}),
                                  cell_of(registry, RoleKind::evict, {{"name", "random"}, {"density", 0.3}})};
  std::vector<Cell> mixed;
  for (const char* name : {"throws_score", "bad_nan", "throws_plan", "bad_index"})
    mixed.push_back(cell_of(registry, RoleKind::select, {{"name", name}, {"density", 0.3}}));
  mixed.push_back(good[0]);
  for (const char* name : {"throws_retain", "bad_kept", "bad_nan", "throws_attended"})
    mixed.push_back(cell_of(registry, RoleKind::evict, {{"name", name}, {"density", 0.3}}));
  mixed.push_back(good[1]);

  for (const bool poison : {false, true}) {
    ReplayOptions options;
    options.phases = {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode};
    options.check = poison;
    const ReplayResult alone = replay(trace, good, options), together = replay(trace, mixed, options);
    std::vector<Row> left;
    for (const Row& row : together.rows) {
      const bool sound = row.cell < 0 || mixed[static_cast<std::size_t>(row.cell)].label == "random";
      CHECK(row.status == (sound ? "ok" : "failed"));
      if (sound)
        left.push_back(row);
      else
        CHECK(row.error.find(mixed[static_cast<std::size_t>(row.cell)].label) != std::string::npos);
    }
    CHECK(together.rows.size() > left.size());
    REQUIRE(left.size() == alone.rows.size());
    for (std::size_t i = 0; i < left.size(); ++i) check_same(left[i], alone.rows[i]);
  }
}
