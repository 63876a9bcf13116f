#include "lacuna/trace/rope.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

using std::numbers::pi;

void require(bool good, const char* field, const char* expected, double found) {
  if (!good) throw Error({fmt::format("bad {}", field), expected, fmt::format("{}", found), "rope", ""});
}

void check(const RopeConfig& c, int head_dim) {
  const std::vector<std::string> known = {"default", "linear", "llama3", "yarn"};
  if (std::find(known.begin(), known.end(), c.type) == known.end()) {
    throw Error({"unknown rope_type", "default, linear, llama3 or yarn", "'" + c.type + "'", "rope",
                 suggestion(c.type, known)});
  }
  require(head_dim >= 2 && head_dim % 2 == 0, "head_dim", "an even number", head_dim);
  require(std::isfinite(c.theta) && c.theta > 1, "rope_theta", "a number above 1", c.theta);
  require(std::isfinite(c.factor) && c.factor > 0, "factor", "a number above 0", c.factor);
  if (c.type == "llama3" || c.type == "yarn") {
    require(std::isfinite(c.original_max_position) && c.original_max_position >= 1, "original_max_position_embeddings",
            "at least 1", c.original_max_position);
  }
  if (c.type == "llama3") {
    require(std::isfinite(c.low_freq_factor) && c.low_freq_factor > 0, "low_freq_factor", "a number above 0",
            c.low_freq_factor);
    require(std::isfinite(c.high_freq_factor) && c.high_freq_factor > c.low_freq_factor, "high_freq_factor",
            "a number above low_freq_factor", c.high_freq_factor);
  }
  if (c.type == "yarn") {
    require(std::isfinite(c.beta_slow) && c.beta_slow > 0, "beta_slow", "a number above 0", c.beta_slow);
    require(std::isfinite(c.beta_fast) && c.beta_fast >= c.beta_slow, "beta_fast", "at least beta_slow", c.beta_fast);
    require(std::isfinite(c.attention_factor) && c.attention_factor >= 0, "attention_factor",
            "a number above 0, or none", c.attention_factor);
  }
}

// Long wavelengths are slowed by the factor, short ones kept, those between interpolated.
double llama3_frequency(const RopeConfig& c, double frequency) {
  const double turns = c.original_max_position * frequency / (2 * pi);  // over the original context
  const double kept = std::clamp((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0.0, 1.0);
  return (1 - kept) * frequency / c.factor + kept * frequency;
}

// A ramp over the channel pairs, between those that turn beta_fast and beta_slow times over the original context.
double yarn_frequency(const RopeConfig& c, double frequency, int pair, int head_dim) {
  auto pair_that_turns = [&](double times) {
    return head_dim * std::log(c.original_max_position / (times * 2 * pi)) / (2 * std::log(c.theta));
  };
  double low = pair_that_turns(c.beta_fast), high = pair_that_turns(c.beta_slow);
  if (c.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  const double slowed = std::clamp((pair - low) / (high - low), 0.0, 1.0);
  return slowed * frequency / c.factor + (1 - slowed) * frequency;
}

}  // namespace

Rope::Rope(const RopeConfig& config, int head_dim) {
  check(config, head_dim);
  for (int pair = 0; pair < head_dim / 2; ++pair) {
    double frequency = std::pow(config.theta, -2.0 * pair / head_dim);
    if (config.type == "linear") frequency /= config.factor;
    if (config.type == "llama3") frequency = llama3_frequency(config, frequency);
    if (config.type == "yarn") frequency = yarn_frequency(config, frequency, pair, head_dim);
    inv_freq_.push_back(frequency);
  }
  if (config.type == "yarn") {
    const double usual = config.factor > 1 ? 0.1 * std::log(config.factor) + 1 : 1;
    scale_ = config.attention_factor > 0 ? config.attention_factor : usual;
  }
}

void Rope::rotate(float* row, double position) const { turn(row, position, scale_); }
void Rope::unrotate(float* row, double position) const { turn(row, -position, 1 / scale_); }
void Rope::shift(float* row, double delta) const { turn(row, delta, 1); }

void Rope::turn(float* row, double position, double scale) const {
  const std::size_t half = inv_freq_.size();
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = position * inv_freq_[i];
    const double c = std::cos(angle) * scale, s = std::sin(angle) * scale;
    const double x = row[i], y = row[i + half];
    row[i] = static_cast<float>(x * c - y * s);
    row[i + half] = static_cast<float>(y * c + x * s);
  }
}

}  // namespace lacuna
