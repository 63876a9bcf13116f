// Selection against a literal recomputation: pairs counted one by one, units taken one by one.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "pipeline/support.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::Gqa;

namespace {

struct Case {
  Script script;
  double density;
  bool proportional = false;
  i32 sinks = 0, recent = 0;
  const char* gqa = "none";
};

/// Score of a unit for a row of the final ranking: reduced over the group by hand.
double ranked_score(const Case& c, i64 head, i64 group, i64 tile, i64 unit) {
  const std::string gqa = c.gqa;
  if (gqa == "none" || gqa == "union") return scripted_score(head, tile, unit);
  float sum = scripted_score(head / group * group, tile, unit), most = sum;
  for (i64 g = 1; g < group; ++g) {
    const float x = scripted_score(head / group * group + g, tile, unit);
    sum += x;
    most = std::max(most, x);
  }
  return gqa == "max" ? most : gqa == "mean" ? sum / static_cast<float>(group) : sum;
}

/// Tokens that the query at q reads in the tile [begin, end), as the rules in docs/metrics.md say.
struct Expected {
  std::vector<std::set<i64>> read;  // by query of the tile
  bool full = false;
};

Expected expect_row(const Case& c, i64 head, i64 group, i64 tile, i64 prompt, i64 constant) {
  const i64 unit = c.script.unit, begin = tile * c.script.q_tile, end = std::min<i64>(begin + c.script.q_tile, prompt);
  const i64 tokens = c.proportional ? round_half_up(c.density * static_cast<double>(end)) : constant;
  Expected out;
  out.read.resize(static_cast<std::size_t>(end - begin));
  if (tokens >= end) {
    out.full = true;
    for (i64 q = begin; q < end; ++q)
      for (i64 j = 0; j <= q; ++j) out.read[static_cast<std::size_t>(q - begin)].insert(j);
    return out;
  }
  const auto take_unit = [&](i64 u) {
    for (i64 q = begin; q < end; ++q)
      for (i64 j = u * unit; j < (u + 1) * unit && j <= q; ++j) out.read[static_cast<std::size_t>(q - begin)].insert(j);
  };
  const i64 units = (end + unit - 1) / unit, diagonal = begin / unit;
  std::set<i64> forced;
  for (i64 u = 0; u < c.script.first_units && u < units; ++u) forced.insert(u);
  for (i64 u = std::max<i64>(0, diagonal - c.script.last_units + 1); c.script.last_units > 0 && u < units; ++u)
    forced.insert(u);
  for (const i64 u : forced) take_unit(u);
  for (i64 q = begin; q < end; ++q)
    for (i64 j = 0; j <= q; ++j)
      if (j < c.sinks || q - j < c.recent) out.read[static_cast<std::size_t>(q - begin)].insert(j);
  i64 target = 0, used = 0;
  for (i64 q = begin; q < end; ++q) target += std::min(tokens, q + 1);
  for (const auto& r : out.read) used += static_cast<i64>(r.size());
  const i64 have = static_cast<i64>(forced.size()) + (c.sinks + c.recent > 0 ? 1 : 0);
  i64 take = std::max<i64>(0, target - used) / (unit * (end - begin));
  take = std::max(take, std::max<i64>(1, c.script.min_units) - have);
  std::vector<i64> order;
  for (i64 u = 0; u < units; ++u) {
    bool read_anyway = forced.count(u) > 0;
    if (unit == 1) {  // a token that the exact part holds for any query of the tile
      for (const auto& r : out.read) read_anyway |= r.count(u) > 0;
    } else {  // a unit that it holds for every one
      bool whole = true;
      for (i64 q = begin; q < end; ++q)
        for (i64 j = u * unit; j < std::min((u + 1) * unit, end); ++j) whole &= j < c.sinks || end - 1 - j < c.recent;
      read_anyway |= whole;
    }
    if (!read_anyway) order.push_back(u);
  }
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) {
    return ranked_score(c, head, group, tile, a) > ranked_score(c, head, group, tile, b);
  });
  for (i64 i = 0; i < std::min<i64>(take, static_cast<i64>(order.size())); ++i)
    take_unit(order[static_cast<std::size_t>(i)]);
  return out;
}

void compare(Bed& bed, const Case& c) {
  script = c.script;
  const sdk::Layer& l = bed.layer.layer();
  const Resolved select = resolved(type_of<Scripted>(), density(c.density, c.proportional),
                                   {{"gqa", c.gqa}, {"sinks", c.sinks}, {"recent", c.recent}});
  const Choice choice = bed.prefill(select);
  const i64 constant = constant_tokens(c.density, bed.prompt), group = l.group();
  REQUIRE(choice.q_tile() == c.script.q_tile);
  for (i64 head = 0; head < l.num_qo_heads; ++head)
    for (i64 tile = 0; tile < choice.tiles(); ++tile) {
      Expected e = expect_row(c, head, group, tile, bed.prompt, constant);
      if (std::string(c.gqa) == "union")
        for (i64 g = 0; g < group; ++g) {
          const Expected other = expect_row(c, head / group * group + g, group, tile, bed.prompt, constant);
          for (std::size_t i = 0; i < e.read.size(); ++i) e.read[i].insert(other.read[i].begin(), other.read[i].end());
        }
      for (std::size_t i = 0; i < e.read.size(); ++i) {
        const i64 q = tile * c.script.q_tile + static_cast<i64>(i);
        const auto cells = choice.sets[static_cast<std::size_t>(head * choice.tiles() + tile)].cells(q, q + 1);
        CAPTURE(head);
        CAPTURE(q);
        REQUIRE(std::set<i64>(cells.begin(), cells.end()) == e.read[i]);
      }
    }
}

/// Asks for spans of queries and uses the first after the others.
struct TwoSpans : sdk::Strategy {
  static sdk::Info info() {
    sdk::Info i{};
    i.name = "two_spans", i.summary = i.rule = i.paper = "-";
    i.phases = sdk::kPrefill;
    i.takes_budget = 0;
    return i;
  }
  void mark(sdk::Context& c, const sdk::Budget&, sdk::Selection& s) override {
    const sdk::Queries all = c.current_queries();
    const float first = all.at(0, 0, 0, 0);
    const sdk::Queries last = c.last_queries(2);
    if (all.at(0, 0, 0, 0) != first || last.at(0, 1, 0, 5) != all.at(0, 1, all.count - 2, 5))
      throw sdk::Failure("the first span is gone");
    if (!std::isnan(last.at(0, 1, 2, 5))) throw sdk::Failure("what follows the call's queries can be read");
    for (i64 r = 0; r < s.rows.count(); ++r) s.full[r] = 1;
  }
};

/// Marks the newest token with a weight.
struct Weighted : sdk::Strategy {
  static sdk::Info info() {
    sdk::Info i = TwoSpans::info();
    i.name = "weighted";
    return i;
  }
  void plan(sdk::Context&, sdk::Plan& p) override { p.weighted = 1; }
  void mark(sdk::Context&, const sdk::Budget&, sdk::Selection& s) override {
    for (i64 r = 0; r < s.rows.count(); ++r) {
      s.token_count[r] = 1;
      s.tokens[r * s.token_capacity] = 0;
      s.token_log_weight[r * s.token_capacity] = 0.5f;
    }
  }
};

}  // namespace

TEST_CASE("ranked units in prefill are those of the rules, whatever unit, tile, forced part and GQA mode") {
  Bed bed(generated(6, 2, 64, 301, 1));
  for (const double density : {0.05, 0.2, 0.6})
    for (const auto& [unit, q_tile] : {std::pair<i32, i32>{1, 64}, {16, 64}, {64, 64}, {16, 16}, {32, 1}, {7, 50}}) {
      compare(bed, {{unit, q_tile}, density});
      compare(bed, {{unit, q_tile, 1, 1}, density});
      compare(bed, {{unit, q_tile, 2, 2, 5}, density, true});
      compare(bed, {{unit, q_tile}, density, false, 4, 40});
    }
  for (const char* gqa : {"mean", "max", "sum", "union"}) compare(bed, {{16, 64, 1, 1}, 0.2, false, 0, 0, gqa});
}

TEST_CASE("a call by ranges of tiles chooses as one call does") {
  Bed bed(generated(4, 2, 64, 500, 1));
  for (const char* gqa : {"none", "sum", "union"}) {
    script = {16, 32, 1, 1};
    const Resolved select = resolved(type_of<Scripted>(), density(0.2), {{"gqa", gqa}});
    ChooseOptions options{true};
    options.keep_scores = true;
    const Choice whole = bed.prefill(select, options);
    options.range_elements = 700;
    const Choice ranges = bed.prefill(select, options);
    REQUIRE(whole.sets.size() == ranges.sets.size());
    for (std::size_t i = 0; i < whole.sets.size(); ++i) CHECK(whole.sets[i].slots == ranges.sets[i].slots);
    CHECK(whole.scores == ranges.scores);
    CHECK(whole.budget.realised_pairs == ranges.budget.realised_pairs);
    CHECK(whole.budget.target_pairs == ranges.budget.target_pairs);
  }
}

TEST_CASE("what is forced counts inside the budget, and a target that it exceeds is marked floor") {
  Bed bed(generated(2, 1, 64, 512, 1));
  script = {16, 64, 1, 4};
  const Choice fits = bed.prefill(resolved(type_of<Scripted>(), density(0.5)));
  CHECK_FALSE(fits.budget.floor);
  CHECK(fits.budget.realised_pairs <= fits.budget.target_pairs);
  CHECK(fits.budget.realised_pairs >= fits.budget.target_pairs - fits.budget.slack_pairs);
  const Choice tight = bed.prefill(resolved(type_of<Scripted>(), density(0.02)));
  CHECK(tight.budget.floor);
  CHECK(tight.budget.realised_pairs > tight.budget.target_pairs);
  script = {16, 64, 2, 1};
  CHECK(bed.prefill(resolved(type_of<Scripted>(), {BudgetSpec::Kind::units, 2, false})).budget.floor);
}

TEST_CASE("top-p: the forced mass counts first, and the crossing unit is included") {
  Bed bed(generated(2, 2, 64, 320, 1));
  for (const double p : {0.3, 0.7, 0.95, 1.0}) {
    script = {16, 64, 1, 1, 0, 1, sdk::ScoreKind::mass};
    const Choice choice = bed.prefill(resolved(type_of<Scripted>(), {BudgetSpec::Kind::mass, p, false}));
    for (i64 head = 0; head < 2; ++head)
      for (i64 tile = 0; tile < choice.tiles(); ++tile) {
        const i64 end = (tile + 1) * 64, units = end / 16, diagonal = tile * 4;
        std::set<i64> taken = {0};
        for (i64 u = diagonal; u < units; ++u) taken.insert(u);
        double total = 0, mass = 0;
        for (i64 u = 0; u < units; ++u) total += scripted_mass(head, tile, u, units);
        for (const i64 u : taken) mass += scripted_mass(head, tile, u, units);
        while (mass < p * total && static_cast<i64>(taken.size()) < units) {
          i64 best = -1;
          for (i64 u = 0; u < units; ++u)
            if (!taken.count(u) &&
                (best < 0 || scripted_mass(head, tile, u, units) > scripted_mass(head, tile, best, units)))
              best = u;
          mass += scripted_mass(head, tile, best, units);
          taken.insert(best);
        }
        std::set<i64> found;
        for (const i32 slot : choice.sets[static_cast<std::size_t>(head * choice.tiles() + tile)].slots)
          found.insert(slot / 16);
        CAPTURE(p);
        CAPTURE(tile);
        CHECK(found == taken);
      }
  }
}

TEST_CASE("only scores of kind mass are cut by mass, and a strategy that ranks needs a budget") {
  Bed bed(generated(2, 2, 64, 64, 1));
  script = {};
  CHECK_THROWS_WITH_AS(bed.prefill(resolved(type_of<Scripted>(), {BudgetSpec::Kind::mass, 0.9, false})),
                       doctest::Contains("cannot be cut by mass"), Error);
  CHECK_THROWS_WITH_AS(bed.prefill(resolved(type_of<Scripted>(), {})), doctest::Contains("needs a budget"), Error);
}

TEST_CASE("what cannot be done to an explicit choice is refused") {
  Bed bed(generated(2, 1, 64, 64, 1));
  CHECK_THROWS_WITH_AS(bed.prefill(resolved(type_of<TwoSpans>(), {}, {{"gqa", "mean"}})),
                       doctest::Contains("nothing to reduce"), Error);
  CHECK_THROWS_WITH_AS(bed.prefill(resolved(type_of<TwoSpans>(), {BudgetSpec::Kind::mass, 0.5, false})),
                       doctest::Contains("cannot be cut by mass"), Error);
  CHECK_THROWS_WITH_AS(bed.prefill(resolved(type_of<Weighted>(), {}, {{"gqa", "union"}})),
                       doctest::Contains("a union would lose"), Error);
  CHECK(bed.prefill(resolved(type_of<Weighted>(), {})).sets[0].log_weight == std::vector<float>{0.5f});
}

TEST_CASE("poisoned queries end where the call's do, and are good for the whole call") {
  Bed bed(generated(2, 1, 64, 64, 1));
  CHECK(bed.prefill(resolved(type_of<TwoSpans>(), {})).sets[0].slots.size() == 64);
}

TEST_CASE("decode: units of the budget at each step, the current one forced") {
  Bed bed(generated(4, 2, 64, 100, 20));
  script = {16, 64, 0, 1};
  const Resolved select = resolved(type_of<Scripted>(), density(0.3));
  LayerPipeline pipeline = bed.pipeline({&select, nullptr, nullptr}, bed.prompt);
  for (i64 i = 0; i < 20; ++i) {
    const Step step = pipeline.step(bed.prompt + i, i);
    const i64 cached = bed.prompt + i + 1, target = round_half_up(0.3 * static_cast<double>(cached)),
              current = (cached - 1) / 16;
    const i64 forced = cached - current * 16, take = std::max<i64>(0, (target - forced) / 16);
    for (i64 head = 0; head < 4; ++head) {
      std::vector<i64> order(static_cast<std::size_t>(current));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](i64 a, i64 b) { return scripted_score(head, 0, a) > scripted_score(head, 0, b); });
      std::set<i64> expected = {current}, found;
      expected.insert(order.begin(), order.begin() + take);
      for (const i32 slot : step.choice.sets[static_cast<std::size_t>(head)].slots) found.insert(slot / 16);
      CHECK(found == expected);
    }
  }
}
