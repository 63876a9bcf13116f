#include "lacuna/trace/rope.hpp"

#include <cmath>

#include "sample.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

RopeConfig config(const std::string& type, double theta, double factor = 1, double original = 0) {
  RopeConfig c;
  c.type = type;
  c.theta = theta;
  c.factor = factor;
  c.original_max_position = original;
  return c;
}

// Those of real models: SmolLM2, Gemma 3's two bases, Llama 3.1, Qwen2.5 long, gpt-oss.
struct Named {
  std::string name;
  RopeConfig config;
  int head_dim;
};
std::vector<Named> models() {
  RopeConfig gpt_oss = config("yarn", 150000, 32, 4096);
  gpt_oss.truncate = false;
  return {{"default", config("default", 100000), 64},
          {"gemma sliding", config("default", 10000), 256},
          {"gemma full, linear", config("linear", 1000000, 8), 256},
          {"llama3", config("llama3", 500000, 8, 8192), 128},
          {"yarn", config("yarn", 1000000, 4, 32768), 128},
          {"yarn, not truncated", gpt_oss, 64}};
}

std::vector<float> random_row(int n, sdk::u64 row) {
  const sdk::Random random{5, 0};
  std::vector<float> out(static_cast<std::size_t>(n));
  for (int c = 0; c < n; ++c) out[c] = random.normal(row, static_cast<sdk::u64>(c));
  return out;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

}  // namespace

TEST_CASE("rope: one pair turns counter-clockwise by position, halves paired") {
  const Rope rope(config("default", 10000), 4);
  std::vector<float> row = {1, 0, 0, 2};
  rope.rotate(row.data(), 3);
  CHECK(row[0] == doctest::Approx(std::cos(3.0)));
  CHECK(row[2] == doctest::Approx(std::sin(3.0)));
  CHECK(row[1] == doctest::Approx(-2 * std::sin(0.03)));
  CHECK(row[3] == doctest::Approx(2 * std::cos(0.03)));
}

TEST_CASE("rope: the inverse undoes the rotation, and a shift moves a rotated row") {
  for (const Named& m : models()) {
    CAPTURE(m.name);
    const Rope rope(m.config, m.head_dim);
    for (const double position : {0.0, 1.0, 517.0, 131071.0}) {
      const std::vector<float> before = random_row(m.head_dim, 1);
      std::vector<float> row = before;
      rope.rotate(row.data(), position);
      if (position > 0) CHECK(largest_difference(row, before) > 0.1);
      std::vector<float> moved = row, expected = before;
      rope.unrotate(row.data(), position);
      CHECK(largest_difference(row, before) < 2e-6);
      rope.shift(moved.data(), -position / 2);
      rope.rotate(expected.data(), position / 2);
      CHECK(largest_difference(moved, expected) < 2e-6);
    }
  }
}

TEST_CASE("rope: q.k depends on the distance alone") {
  for (const Named& m : models()) {
    CAPTURE(m.name);
    const Rope rope(m.config, m.head_dim);
    auto logit = [&](double query_position, double key_position) {
      std::vector<float> q = random_row(m.head_dim, 2), k = random_row(m.head_dim, 3);
      rope.rotate(q.data(), query_position);
      rope.rotate(k.data(), key_position);
      return dot(q, k);
    };
    CHECK(logit(20, 3) == doctest::Approx(logit(4020, 4003)).epsilon(1e-5));
    CHECK(std::abs(logit(20, 3) - logit(21, 3)) > 1e-3);
  }
}

// Expected values computed apart from this code, from the published formulas, in double.
TEST_CASE("rope: frequencies of the scalings") {
  struct Expected {
    std::size_t model;
    std::vector<std::pair<int, double>> frequencies;
    double scale;
  };
  const std::vector<Named> all = models();
  const Expected cases[] = {
      {2, {{0, 1 / 8.0}, {64, 1e-3 / 8}}, 1},
      {3,
       {{0, 1.0},
        {20, 0.016560440080994446},
        {28, 0.0032114459947525913},
        {29, 0.002166570763503359},
        {30, 0.0013718935677611381},
        {34, 0.00017850781276799638},
        {35, 9.556212353964683e-05},
        {63, 3.068925988914511e-07}},
       1},
      {4,
       {{0, 1.0},
        {20, 0.01333521432163324},
        {24, 0.005375321490790102},
        {30, 0.0010643609812470017},
        {38, 9.262301704129459e-05},
        {40, 4.445698525097307e-05},
        {63, 3.102344401879299e-07}},
       1.138629436111989},
      {5,
       {{0, 1.0},
        {8, 0.050813274815461475},
        {9, 0.03170569618466377},
        {12, 0.006794959489732219},
        {17, 0.00012931870124506317},
        {18, 3.8308812373753384e-05},
        {31, 3.0235114281192144e-07}},
       1.3465735902799727},
  };
  for (const Expected& c : cases) {
    const Named& m = all[c.model];
    CAPTURE(m.name);
    const Rope rope(m.config, m.head_dim);
    REQUIRE(rope.frequencies().size() == static_cast<std::size_t>(m.head_dim) / 2);
    for (const auto& [pair, expected] : c.frequencies) {
      CAPTURE(pair);
      CHECK(rope.frequencies()[static_cast<std::size_t>(pair)] == doctest::Approx(expected).epsilon(1e-12));
    }
    std::vector<float> row(static_cast<std::size_t>(m.head_dim), 1.f);
    rope.rotate(row.data(), 0);
    CHECK(row[0] == doctest::Approx(c.scale));
  }
}

TEST_CASE("rope: yarn's attention factor") {
  auto scale = [](RopeConfig c) {
    std::vector<float> row(8, 1.f);
    Rope(c, 8).rotate(row.data(), 0);
    return row[0];
  };
  RopeConfig c = config("yarn", 10000, 1, 4096);
  CHECK(scale(c) == 1.f);
  c.factor = 4;
  CHECK(scale(c) == doctest::Approx(0.1 * std::log(4.0) + 1));
  c.attention_factor = 0.75;
  CHECK(scale(c) == 0.75f);
}

TEST_CASE("rope: bad configurations") {
  check_error([] { Rope(config("longrope", 10000), 64); }, {"unknown rope_type", "'longrope'", "known: default"});
  check_error([] { Rope(config("default", 10000), 63); }, {"bad head_dim", "an even number", "63"});
  check_error([] { Rope(config("default", NAN), 64); }, {"bad rope_theta", "nan"});
  check_error([] { Rope(config("linear", 10000, -2), 64); }, {"bad factor", "-2"});
  check_error([] { Rope(config("yarn", 10000, 4), 64); }, {"bad original_max_position_embeddings", "0"});
  RopeConfig c = config("llama3", 10000, 4, 100);
  c.high_freq_factor = c.low_freq_factor;
  check_error([&] { Rope(c, 64); }, {"bad high_freq_factor"});
  c = config("yarn", 10000, 4, 100);
  c.beta_slow = 64;
  check_error([&] { Rope(c, 64); }, {"bad beta_fast", "at least beta_slow"});
}
