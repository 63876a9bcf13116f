// The numbers that every strategy and kernel builds on: half conversions and the random generator of the SDK.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lacuna/sdk/types.hpp"

using namespace lacuna::sdk;

namespace {

// The definition: sign, exponent and mantissa by ldexp.
double value_of_half(u16 h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1), mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = h & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// Every 16-bit pattern, and on both signs every midpoint of neighbours with the floats beside it.
template <class From, class To>
void check_conversions(From from, To to, int exponent_bits) {
  const u16 infinity = static_cast<u16>(((1 << exponent_bits) - 1) << (15 - exponent_bits));
  int wrong = 0;
  for (u32 i = 0; i < 65536; ++i) {
    const u16 h = static_cast<u16>(i);
    const float f = from(h);
    const double expected = value_of_half(h, exponent_bits);
    if (std::isnan(expected)) {
      wrong += !std::isnan(f) || !std::isnan(from(to(f)));
      continue;
    }
    wrong += f != static_cast<float>(expected) || std::signbit(f) != std::signbit(expected) || to(f) != h;
  }
  CHECK(wrong == 0);
  for (u16 h = 0; h + 1 < infinity; ++h) {
    const float middle =
        static_cast<float>((value_of_half(h, exponent_bits) + value_of_half(h + 1, exponent_bits)) / 2);
    const float below = std::nextafter(middle, 0.f),
                above = std::nextafter(middle, std::numeric_limits<float>::infinity());
    const u16 even = h % 2 == 0 ? h : static_cast<u16>(h + 1);
    wrong += to(middle) != even || to(-middle) != (even | 0x8000);
    wrong += to(below) != h || to(-below) != (h | 0x8000);
    wrong += to(above) != h + 1 || to(-above) != ((h + 1) | 0x8000);
  }
  CHECK(wrong == 0);
  const float largest = from(static_cast<u16>(infinity - 1));
  const float beyond = static_cast<float>(largest + (largest - from(static_cast<u16>(infinity - 2))) / 2);
  CHECK(to(beyond) == infinity);
  CHECK(to(std::nextafter(beyond, 0.f)) == infinity - 1);
}

}  // namespace

TEST_CASE("bf16 and fp16: exact from, round to nearest even to, over all patterns") {
  check_conversions([](u16 h) { return from_f16(h); }, [](float f) { return to_f16(f); }, 5);
  check_conversions([](u16 h) { return from_bf16(h); }, [](float f) { return to_bf16(f); }, 8);
}

TEST_CASE("bf16 and fp16: known values") {
  CHECK(to_f16(1.f) == 0x3c00);
  CHECK(to_f16(65504.f) == 0x7bff);
  CHECK(to_f16(65520.f) == 0x7c00);
  CHECK(to_f16(1e30f) == 0x7c00);
  CHECK(to_f16(5.9604645e-8f) == 0x0001);
  CHECK(to_bf16(3.14159265f) == 0x4049);
  CHECK(to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(std::isnan(from_bf16(to_bf16(float_of_bits(0x7f800001u)))));  // a NaN whose high mantissa bits are 0
}

TEST_CASE("load reads every element type") {
  const u16 bf16 = to_bf16(-2.5f), f16 = to_f16(-2.5f), code = 7;
  const float f32 = -2.5f;
  const i32 whole = -3;
  const u8 byte = 200;
  CHECK(load(&bf16, Dtype::bf16, 0) == -2.5f);
  CHECK(load(&f16, Dtype::f16, 0) == -2.5f);
  CHECK(load(&f32, Dtype::f32, 0) == -2.5f);
  CHECK(load(&whole, Dtype::i32, 0) == -3.f);
  CHECK(load(&code, Dtype::u16, 0) == 7.f);
  CHECK(load(&byte, Dtype::u8, 0) == 200.f);
}

// Random123's kat_vectors for philox4x32-10. Our counter words are (counter low, counter high, row low, row high ^
// step), the result words 1 and 0.
TEST_CASE("Random is Philox4x32-10") {
  CHECK(Random{0, 0}.bits(0, 0) == 0xe169c58d6627e8d5ull);
  CHECK(Random{0xffffffffffffffffull, 0}.bits(0xffffffffffffffffull, 0xffffffffffffffffull) == 0x41c83b0e408f276dull);
  CHECK(Random{0x299f31d0a4093822ull, 0}.bits(0x0370734413198a2eull, 0x85a308d3243f6a88ull) == 0x94fdcceb'd16cfe09ull);
  CHECK(Random{0x299f31d0a4093822ull, 0x03707344}.bits(0x13198a2eull, 0x85a308d3243f6a88ull) == 0x94fdcceb'd16cfe09ull);
}

TEST_CASE("Random: uniform and normal have their moments, and every address its own draw") {
  const Random random{42, 3};
  double sum = 0, squares = 0, uniform = 0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    const double n = random.normal(1, static_cast<u64>(i));
    const float u = random.uniform(2, static_cast<u64>(i));
    CHECK_UNARY(u >= 0.f && u < 1.f);
    sum += n;
    squares += n * n;
    uniform += u;
  }
  CHECK(std::abs(sum / kDraws) < 0.02);
  CHECK(std::abs(squares / kDraws - 1) < 0.03);
  CHECK(std::abs(uniform / kDraws - 0.5) < 0.005);
  CHECK(random.bits(0, 1) != random.bits(1, 0));
  CHECK(random.bits(0, 1) != Random{42, 4}.bits(0, 1));
  CHECK(random.bits(0, 1) != Random{43, 3}.bits(0, 1));
}
