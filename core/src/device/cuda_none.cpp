#include <fmt/format.h>

#include "lacuna/base/error.hpp"
#include "lacuna/device/clocks.hpp"
#include "lacuna/device/device.hpp"
#include "lacuna/device/peaks.hpp"
#include "lacuna/device/timing.hpp"

namespace lacuna {
namespace {

[[noreturn]] void refuse(const std::string& wanted) {
  throw Error({"no CUDA in this build", fmt::format("a build with CUDA for {}", wanted), "a CPU build", "",
               "Use device = \"cpu\", or install the CUDA toolkit and build with a preset that finds it."});
}

}  // namespace

std::shared_ptr<Device> cuda_device(int index) { refuse(fmt::format("device cuda:{}", index)); }
Timing time_work(Device&, const std::vector<std::function<void()>>&, bool, const TimingOptions&) {
  refuse("times by events");
}
DevicePeaks measure_peaks(Device&) { refuse("the peaks of a GPU"); }
std::optional<Clocks> read_clocks(int) { return std::nullopt; }

}  // namespace lacuna
