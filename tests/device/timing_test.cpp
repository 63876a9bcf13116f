#include "lacuna/device/timing.hpp"

#include <doctest/doctest.h>

#include "lacuna/base/error.hpp"
#include "lacuna/device/clocks.hpp"
#include "lacuna/device/peaks.hpp"

using lacuna::quartiles, lacuna::throttle_text;

TEST_CASE("quartiles interpolate between the sorted values") {
  const lacuna::Quartiles five = quartiles({5, 1, 4, 2, 3});
  CHECK(five.q1 == 2);
  CHECK(five.median == 3);
  CHECK(five.q3 == 4);
  const lacuna::Quartiles four = quartiles({40, 10, 30, 20});
  CHECK(four.q1 == doctest::Approx(17.5));
  CHECK(four.median == doctest::Approx(25));
  CHECK(four.q3 == doctest::Approx(32.5));
  const lacuna::Quartiles one = quartiles({7});
  CHECK(one.q1 == 7);
  CHECK(one.q3 == 7);
  CHECK_THROWS_AS(quartiles({}), lacuna::Error);
}

TEST_CASE("the reasons of low clocks are named") {
  CHECK(throttle_text(0) == "none");
  CHECK(throttle_text(0x1) == "idle");
  CHECK(throttle_text(0x4 | 0x40) == "software power cap, hardware thermal slowdown");
  CHECK(throttle_text(0x100) == "display clocks");
  CHECK(throttle_text(0x8 | 0x4000) == "hardware slowdown, 0x4000");
}

TEST_CASE("times and peaks want a GPU") {
  const auto device = lacuna::cpu_device();
  CHECK_THROWS_AS(lacuna::time_work(*device, {[] {}}, false), lacuna::Error);
  CHECK_THROWS_AS(lacuna::measure_peaks(*device), lacuna::Error);
}
