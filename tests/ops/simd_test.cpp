#include "lacuna/ops/simd.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "attention/paged_fixture.hpp"
#include "lacuna/ops/multiply.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

template <class F>
void on_every_isa(F f) {
  for (const auto isa : {simd::Isa::portable, simd::Isa::avx2, simd::Isa::avx512}) {
    if (simd::use_isa(isa) != isa) MESSAGE("this machine has no such instructions: skipped");
    f();
  }
  simd::use_isa(simd::Isa::avx512);
}

float exp_of(float x) {
  alignas(16) float lanes[4] = {x, x, x, x};
  simd::multiversion([&](auto) LACUNA_INLINE_LAMBDA { simd::exp<4>(simd::vector_at<simd::Vector<float, 4>>(lanes)); });
  return lanes[2];
}

}  // namespace

TEST_CASE("exp is within 2 ulp, 0 for what underflows, NaN for NaN") {
  on_every_isa([] {
    double worst = 0;
    for (float x = -87.2f; x < 88.f; x += 0.00137f) {
      const double exact = std::exp(static_cast<double>(x));
      const double ulp =
          std::nextafter(static_cast<float>(exact), std::numeric_limits<float>::infinity()) - static_cast<float>(exact);
      worst = std::max(worst, std::abs(exp_of(x) - exact) / ulp);
    }
    CHECK(worst <= 2.);
    CHECK(exp_of(0.f) == 1.f);
    CHECK(exp_of(-88.f) == 0.f);
    CHECK(exp_of(-1e30f) == 0.f);
    CHECK(exp_of(-std::numeric_limits<float>::infinity()) == 0.f);
    CHECK(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
  });
}

TEST_CASE("multiply: every lane count, both directions, with and without what was there") {
  on_every_isa([] {
    for (const int lanes : {16, 48, 64, 80, 144})
      for (const int depth : {1, 37, 64}) {
        const int rows = 24;
        const auto a = random_floats(rows * depth, 1), b = random_floats(depth * lanes, 2),
                   c = random_floats(rows * lanes, 3);
        const auto keep = random_floats(lanes, 4);
        for (const bool transposed : {false, true})
          for (const bool kept : {false, true}) {
            const i64 row_stride = transposed ? 1 : depth, step_stride = transposed ? rows : 1;
            const simd::Aligned<float> narrow_b(b.begin(), b.end()), narrow_keep(keep.begin(), keep.end());
            simd::Aligned<float> narrow(c.begin(), c.end());
            const simd::Aligned<double> wide_a(a.begin(), a.end()), wide_b(b.begin(), b.end()),
                wide_keep(keep.begin(), keep.end());
            simd::Aligned<double> wide(c.begin(), c.end());
            multiply<float>(a.data(), row_stride, step_stride, rows, depth, narrow_b.data(), lanes, narrow.data(),
                            kept ? narrow_keep.data() : nullptr);
            multiply<double>(wide_a.data(), row_stride, step_stride, rows, depth, wide_b.data(), lanes, wide.data(),
                             kept ? wide_keep.data() : nullptr);
            double worst_narrow = 0, worst_wide = 0;
            for (int r = 0; r < rows; ++r)
              for (int l = 0; l < lanes; ++l) {
                const auto at = static_cast<std::size_t>(r * lanes + l);
                double sum = kept ? static_cast<double>(keep[static_cast<std::size_t>(l)]) * c[at] : 0;
                for (int t = 0; t < depth; ++t)
                  sum += static_cast<double>(a[static_cast<std::size_t>(r * row_stride + t * step_stride)]) *
                         b[static_cast<std::size_t>(t * lanes + l)];
                worst_narrow = std::max(worst_narrow, std::abs(narrow[at] - sum));
                worst_wide = std::max(worst_wide, std::abs(wide[at] - sum));
              }
            CHECK(worst_narrow < 3e-5);
            CHECK(worst_wide < 1e-12);
          }
      }
  });
}

TEST_CASE("convert_row reads every bf16 and fp16 bit pattern") {
  on_every_isa([] {
    std::vector<sdk::u16> bits(65536 + 5);
    for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<sdk::u16>(i);
    std::vector<float> out(bits.size());
    for (const auto dtype : {sdk::Dtype::bf16, sdk::Dtype::f16}) {
      convert_row(bits.data(), dtype, 1, 65539, out.data());
      i64 wrong = 0;
      for (i64 i = 0; i < 65539; ++i) {
        const float expected = sdk::load(bits.data(), dtype, i + 1), found = out[static_cast<std::size_t>(i)];
        wrong += std::isnan(expected) ? !std::isnan(found) : sdk::bits_of_float(found) != sdk::bits_of_float(expected);
      }
      CHECK(wrong == 0);
    }
  });
}
