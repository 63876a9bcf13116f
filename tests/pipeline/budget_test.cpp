// Budget arithmetic against its definition, counted out.
#include <doctest/doctest.h>

#include <cmath>
#include <initializer_list>

#include "lacuna/pipeline/budget.hpp"

using namespace lacuna;
using sdk::i64;

namespace {
i64 counted(i64 tokens, i64 begin, i64 end) {
  i64 sum = 0;
  for (i64 q = begin; q < end; ++q) sum += std::min(tokens, q + 1);
  return sum;
}
}  // namespace

TEST_CASE("capped_pairs counts what each query may read") {
  for (const i64 begin : {0, 1, 5, 64, 100})
    for (const i64 n : {1, 2, 17, 64})
      for (const i64 tokens : {0, 1, 4, 63, 64, 65, 120, 1000})
        CHECK(capped_pairs(tokens, begin, begin + n) == counted(tokens, begin, begin + n));
}

TEST_CASE("constant_tokens is the largest K whose pairs stay within the density") {
  for (const i64 prompt : {1, 2, 7, 64, 65, 300, 1996})
    for (const double density : {0.001, 0.02, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0}) {
      const double limit = density * static_cast<double>(prompt * (prompt + 1) / 2);
      i64 k = 0;
      while (k < prompt && static_cast<double>(counted(k + 1, 0, prompt)) <= limit) ++k;
      CAPTURE(prompt);
      CAPTURE(density);
      CHECK(constant_tokens(density, prompt) == k);
    }
}

TEST_CASE("round_half_up") {
  CHECK(round_half_up(0.5) == 1);
  CHECK(round_half_up(1.5) == 2);
  CHECK(round_half_up(2.5) == 3);
  CHECK(round_half_up(2.4999) == 2);
}

TEST_CASE("targets of a tile and of a cache") {
  using Kind = BudgetSpec::Kind;
  const i64 constant = constant_tokens(0.1, 512);
  const auto of_tile = [](BudgetSpec budget, i64 visible) { return target_rule(budget, 512, 16).tokens(visible); };
  CHECK(of_tile({Kind::density, 0.1, false}, 300) == constant);
  CHECK(of_tile({Kind::density, 0.1, true}, 512) == 51);
  CHECK(of_tile({Kind::density, 0.5, true}, 5) == 3);
  CHECK(of_tile({Kind::tokens, 100, false}, 512) == 100);
  CHECK(of_tile({Kind::units, 3, false}, 512) == 48);
  CHECK(of_tile({Kind::mass, 0.9, false}, 512) == 512);
  CHECK(of_tile({}, 512) == 512);
  CHECK(target_rule({Kind::density, 0.25, false}, -1, 16).tokens(1002) == 251);
  CHECK(target_rule({Kind::units, 3, false}, -1, 16).tokens(1002) == 48);
}

TEST_CASE("ranked_units: what the forced ones leave, and the least a row may have") {
  CHECK(ranked_units(1000, 200, 2, 16, 1, 0) == 50);
  CHECK(ranked_units(1000, 200, 2, 16, 4, 0) == 12);
  CHECK(ranked_units(215, 200, 2, 16, 1, 0) == 0);
  CHECK(ranked_units(100, 200, 2, 16, 1, 0) == 0);
  CHECK(ranked_units(100, 200, 2, 16, 1, 5) == 3);
  CHECK(ranked_units(0, 0, 0, 16, 1, 0) == 1);  // nothing forced: a row reads something
}
