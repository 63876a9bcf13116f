// The promise of docs/metrics.md row by row, counted out anew: a row reads its target to 1 % or one unit, unless what
// it must read exceeds it, and then the choice is marked floor.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "replay/conformance_bench.hpp"
#include "replay/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::i32;
using sdk::i64;

namespace {

/// Pairs that queries [begin, end) read of `set`, one by one.
i64 counted_pairs(const RowSet& set, i64 begin, i64 end) {
  i64 pairs = 0;
  for (i64 q = begin; q < end; ++q)
    for (const i32 j : set.cells(begin, end)) {
      const bool listed = std::binary_search(set.slots.begin(), set.slots.end(), j);
      pairs += j <= q && (listed || j < set.exact_sinks || q - j < set.exact_window);
    }
  return pairs;
}

/// Target of a tile: the sum over its queries of min(K, q + 1), K the largest that fits the density over the prompt.
i64 target_pairs(double density, i64 prompt, i64 begin, i64 end) {
  double limit = 0;
  for (i64 q = 0; q < prompt; ++q) limit += density * static_cast<double>(q + 1);
  i64 k = 0;
  for (; k < prompt; ++k) {
    i64 sum = 0;
    for (i64 q = 0; q < prompt; ++q) sum += std::min(k + 1, q + 1);
    if (static_cast<double>(sum) > limit) break;
  }
  i64 pairs = 0;
  for (i64 q = begin; q < end; ++q) pairs += std::min(k, q + 1);
  return pairs;
}

}  // namespace

TEST_CASE("every row of every method that takes a density keeps to it within 1 % or one unit, or is marked floor") {
  int checked = 0;
  for (const StrategyType* type : built_ins().all()) {
    Bench bench(built_ins(), *type);
    for (const Use& use : bench.uses()) {
      if (use.role != RoleKind::select || !type->entry().takes_budget || type->entry().wrapper ||
          (type->entry().needs & sdk::kNeedsAllLayers))
        continue;
      for (const double density : {0.1, 0.3, 0.7}) {
        const Cell cell = bench.calibrated(bench.cell(use, {{"density", density}}), kRegular);
        const i32 unit = bench.plan(use, cell).unit_tokens;
        LayerReplay& layer = bench.layer(kRegular, true);
        const PhaseQueries q = bench.queries(use, kRegular, cell);
        i64 at = q.begin;
        PhaseOptions options;
        options.on_step = [&](const Step& step) {
          const Choice& choice = step.choice;
          const i64 first = use.phase == ReplayPhase::prefill ? 0 : at;
          for (std::size_t r = 0; r < choice.sets.size(); ++r) {
            const i64 begin = first + static_cast<i64>(r) % choice.tiles() * choice.q_tile(),
                      end = std::min<i64>(begin + choice.q_tile(), use.phase == ReplayPhase::prefill ? q.end : at + 1),
                      queries = end - begin;
            const i64 target = use.phase == ReplayPhase::prefill
                                   ? target_pairs(density, q.end, begin, end)
                                   : static_cast<i64>(std::floor(density * static_cast<double>(end) + 0.5));
            const i64 read = counted_pairs(choice.sets[r], begin, end);
            // A unit on the diagonal counts whole and is read in part: so much less may be read.
            const double slack = std::max(0.01 * static_cast<double>(target), static_cast<double>(unit * queries));
            const double diagonal = static_cast<double>(queries) * static_cast<double>(queries + unit);
            CAPTURE(type->name());
            CAPTURE(density);
            CAPTURE(begin);
            CAPTURE(unit);
            CAPTURE(target);
            CAPTURE(read);
            if (!choice.budget.floor && !type->entry().mark)
              CHECK(static_cast<double>(read) <= static_cast<double>(target) + slack);
            CHECK(static_cast<double>(read) >= static_cast<double>(target) - slack - diagonal);
            ++checked;
          }
          ++at;
        };
        run_phase(layer, bench.info(kRegular), cell, use.phase, q, options);
      }
    }
  }
  CHECK(checked > 1000);
}
