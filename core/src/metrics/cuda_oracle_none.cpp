#include "lacuna/base/error.hpp"
#include "lacuna/metrics/cuda_oracle.hpp"

namespace lacuna {
namespace {

[[noreturn]] void refuse(const Device& device) {
  throw Error({"no CUDA in this build", "a build with CUDA for an oracle on a GPU", device.describe(), "",
               "Use device = \"cpu\", or install the CUDA toolkit and build with a preset that finds it."});
}

}  // namespace

std::vector<std::vector<double>> matched_oracle_cuda(const Attention&, sdk::i32, const float*,
                                                     const std::vector<OracleRequest>&, Device& device, std::size_t) {
  refuse(device);
}

std::vector<std::vector<double>> matched_evict_oracle_cuda(const Attention&, sdk::i64, const float*,
                                                           const std::vector<std::vector<sdk::i64>>&, Device& device) {
  refuse(device);
}

}  // namespace lacuna
