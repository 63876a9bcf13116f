// Rotary position embedding (Su et al. 2021) in the rotate-half convention, forward and inverse, with the scalings that
// traces name: default, linear (Chen et al. 2023), llama3 (Llama Team 2024) and yarn (Peng et al. 2023), with the
// formulas of Hugging Face's modeling_rope_utils. fp32 rows, angles in fp64.
#pragma once

#include <string>
#include <vector>

namespace lacuna {

struct RopeConfig {
  std::string type = "default";
  double theta = 10000;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;            // llama3
  double original_max_position = 0;                            // llama3, yarn
  double beta_fast = 32, beta_slow = 1, attention_factor = 0;  // yarn; 0: 0.1 ln(factor) + 1
  bool truncate = true;                                        // yarn: the ramp's ends are rounded to whole channels
};

class Rope {
 public:
  /// Throws Error for an unknown type, an odd head_dim or a factor out of range.
  Rope(const RopeConfig& config, int head_dim);
  /// In place on one row of head_dim: x -> R(position) x.
  void rotate(float* row, double position) const;
  /// The inverse: what the row was before RoPE at that position.
  void unrotate(float* row, double position) const;
  /// Rotates a row that already carries a position by `delta` more (cached keys that move), scale unchanged.
  void shift(float* row, double delta) const;
  /// Rotation speed of each channel pair, radians a token.
  const std::vector<double>& frequencies() const { return inv_freq_; }
  /// Factor of cos and sin (yarn's attention factor; else 1).
  double scale() const { return scale_; }

 private:
  void turn(float* row, double position, double scale) const;
  std::vector<double> inv_freq_;
  double scale_ = 1;  // yarn multiplies cos and sin
};

}  // namespace lacuna
