#include "lacuna/device/budget.hpp"

#include <doctest/doctest.h>

#include <cstdint>

#include "lacuna/base/error.hpp"

using lacuna::bytes_text, lacuna::MemoryPlan;

TEST_CASE("sizes are written in the unit that they fill") {
  CHECK(bytes_text(0) == "0 bytes");
  CHECK(bytes_text(1023) == "1023 bytes");
  CHECK(bytes_text(1536) == "1.5 KiB");
  CHECK(bytes_text(std::size_t{256} << 20) == "256.0 MiB");
  CHECK(bytes_text(std::size_t{9} << 28) == "2.25 GiB");
}

TEST_CASE("a memory plan adds up, and names its parts from the largest") {
  MemoryPlan plan;
  CHECK(plan.total() == 0);
  CHECK(plan.describe() == "nothing");
  plan.add("scores", std::size_t{64} << 20);
  plan.add("KV pages", std::size_t{1} << 30);
  plan.add("side data", 0);
  plan.add("scores", std::size_t{192} << 20);
  CHECK(plan.total() == (std::size_t{1} << 30) + (std::size_t{256} << 20));
  CHECK(plan.describe() == "1.25 GiB: KV pages 1.00 GiB, scores 256.0 MiB");
}

TEST_CASE("a memory plan that does not fit names what is needed, what is free and the largest parts") {
  MemoryPlan plan;
  for (std::size_t i = 1; i <= 5; ++i) plan.add("part " + std::to_string(i), i << 20);
  CHECK_NOTHROW(plan.require(plan.total(), "here"));
  try {
    plan.require(plan.total() - 1, "cuda:0, layer 7");
    FAIL("a byte too few was enough");
  } catch (const lacuna::Error& e) {
    CHECK(e.problem().expected == "15.0 MiB (largest: part 5 5.0 MiB, part 4 4.0 MiB, part 3 3.0 MiB)");
    CHECK(e.problem().found == "15.0 MiB free");
    CHECK(e.problem().where == "cuda:0, layer 7");
    CHECK_FALSE(e.problem().remedy.empty());
  }
}

TEST_CASE("a memory plan beyond every memory does not wrap around") {
  MemoryPlan plan;
  plan.add("a", SIZE_MAX - 1);
  plan.add("a", 5);
  plan.add("b", 7);
  CHECK(plan.total() == SIZE_MAX);
  CHECK_THROWS_AS(plan.require(std::size_t{1} << 40, ""), lacuna::Error);
}
