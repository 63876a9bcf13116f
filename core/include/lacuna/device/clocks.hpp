// The clocks that a GPU runs at now, and why not higher: recorded beside times, because both move.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lacuna {

struct Clocks {
  int sm_mhz, memory_mhz, sm_max_mhz;
  double watts, celsius;
  std::string throttle;  // throttle_text() of what limits the clocks now
};

/// Clocks of a CUDA device (numbered as for cuda_device) through NVML; nullopt where the library or the device's entry
/// is missing, or the build has no CUDA.
std::optional<Clocks> read_clocks(int device);

/// NVML's clock event reasons in words, "none" for none; bits without a name in hexadecimal.
std::string throttle_text(std::uint64_t reasons);

}  // namespace lacuna
