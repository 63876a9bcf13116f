#include <fmt/format.h>

#include "lacuna/base/error.hpp"
#include "lacuna/device/device.hpp"

namespace lacuna {

std::shared_ptr<Device> cuda_device(int index) {
  throw Error({"no CUDA in this build", fmt::format("a build with CUDA for device cuda:{}", index), "a CPU build", "",
               "Use device = \"cpu\", or install the CUDA toolkit and build with a preset that finds it."});
}

}  // namespace lacuna
