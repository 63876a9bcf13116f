// Rules about runs as a whole: contract, shapes, poison, determinism, budget.
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "replay/conformance_rules.hpp"

namespace lacuna {

namespace {
const Json kSome = {{"density", 0.3}};

Json some_budget(const Bench& bench) { return bench.entry().takes_budget ? kSome : Json::object(); }

/// A strategy that takes a budget may refuse to run without one, if it says so.
bool may_refuse(const Bench& bench, const Json& budget, const std::string& error) {
  return budget.empty() && bench.entry().takes_budget && error.find("budget") != std::string::npos;
}

Verdict run_all(Bench& bench, const Shape* begin, const Shape* end) {
  int runs = 0;
  for (const Use& use : bench.uses())
    for (const Json& budget : bench.budgets(use))
      for (const Shape* shape = begin; shape != end; ++shape, ++runs) {
        const Outcome o = bench.run(use, *shape, bench.cell(use, budget));
        if (o.failed() && may_refuse(bench, budget, o.error)) continue;
        if (o.failed()) return fail(describe(use, *shape, budget) + ": " + o.error);
        const auto finite = [](float x) { return std::isfinite(x); };
        const auto wrong = std::find_if_not(o.run.out.begin(), o.run.out.end(), finite);
        if (wrong != o.run.out.end())
          return fail(fmt::format(
              "{}: output {} of query head {}", describe(use, *shape, budget), *wrong,
              (wrong - o.run.out.begin()) * shape->num_qo_heads / static_cast<std::ptrdiff_t>(o.run.out.size())));
      }
  return {true, fmt::format("{} runs", runs)};
}

/// Sets the number of threads as long as it lives.
class Threads {
 public:
  explicit Threads(int n) : before_(omp_get_max_threads()) { omp_set_num_threads(n); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;

 private:
  int before_;
};

Outcome on_threads(Bench& bench, const Use& use, const Cell& cell, int threads) {
  const Threads set(threads);
  return bench.run(use, kRegular, cell);
}
}  // namespace

Verdict rule_contract(Bench& bench) {
  if (bench.uses().empty()) return not_applicable("nothing stands beside it here (a base, or a scorer)");
  return run_all(bench, &kRegular, &kRegular + 1);
}

Verdict rule_awkward_shape(Bench& bench) { return run_all(bench, std::begin(kAwkward), std::end(kAwkward)); }

Verdict rule_poison(Bench& bench) {
  for (const Use& use : bench.uses()) {
    const Json budget = some_budget(bench);
    const Cell cell = bench.cell(use, budget);
    // Odd lengths end inside a page, so that there is something to read beyond them.
    for (const Shape& shape : {kRegular, kAwkward[1], kAwkward[4]}) {
      const Outcome clean = bench.run(use, shape, cell, false), poisoned = bench.run(use, shape, cell, true);
      const std::string what = difference(clean, poisoned);
      if (!what.empty())
        return fail(describe(use, shape, budget) + ": NaN beyond the cache or the queries shows: " + what);
    }
  }
  return {true, "NaN beyond the cache and the queries changes nothing"};
}

Verdict rule_determinism(Bench& bench) {
  bool seed_matters = false;
  for (const Use& use : bench.uses()) {
    const Json budget = some_budget(bench);
    Cell cell = bench.cell(use, budget);
    const Outcome first = on_threads(bench, use, cell, 2);
    for (const int threads : {2, 1}) {
      const std::string what = difference(first, on_threads(bench, use, cell, threads));
      if (!what.empty())
        return fail(fmt::format("{}: run again on {} thread(s): {}", describe(use, kRegular, budget), threads, what));
    }
    cell.seed = 1;
    const std::string what = difference(first, on_threads(bench, use, cell, 2));
    seed_matters |= !what.empty();
    if (!what.empty() && !bench.entry().stochastic)
      return fail(describe(use, kRegular, budget) + ": another seed, yet it does not declare stochastic: " + what);
  }
  if (bench.entry().stochastic && !seed_matters) return fail("declares stochastic, and another seed changes nothing");
  return {true, bench.entry().stochastic ? "equal seed, equal bits; another seed differs"
                                         : "equal bits on one thread and two"};
}

Verdict rule_budget(Bench& bench) {
  if (!bench.entry().takes_budget) return not_applicable("it takes no budget");
  if (bench.entry().needs & sdk::kNeedsAllLayers) return not_applicable("what a layer reads depends on the others");
  constexpr double kRoomy = 0.8;
  for (const Use& use : bench.uses())
    for (const double density : {0.3, 0.5, kRoomy}) {
      const Json budget = {{"density", density}};
      const Outcome o = bench.run(use, kRegular, bench.cell(use, budget));
      if (o.failed()) return fail(describe(use, kRegular, budget) + ": " + o.error);
      for (const char* mark : {"off-budget", "floor"}) {
        if (std::find(o.run.marks.begin(), o.run.marks.end(), mark) == o.run.marks.end()) continue;
        if (mark != std::string("floor") || density == kRoomy)
          return fail(fmt::format("{}: {}: realised {:.4f} of a target of {:.4f}", describe(use, kRegular, budget),
                                  mark, o.run.realised_head, o.run.target_share));
      }
    }
  return {true, "within 1 % or one unit a row"};
}

}  // namespace lacuna
