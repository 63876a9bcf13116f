#include "lacuna/base/error.hpp"
#include "moves.hpp"

namespace lacuna {

std::unique_ptr<Moves> make_cuda_moves(const Device& device) {
  throw Error({"no CUDA in this build", "a build with CUDA for a KV cache on a GPU", device.describe(), "",
               "Use device = \"cpu\", or install the CUDA toolkit and build with a preset that finds it."});
}

}  // namespace lacuna
