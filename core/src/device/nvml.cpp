#include "nvml.hpp"

#include <dlfcn.h>

namespace lacuna {
namespace {

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::unique_ptr<Nvml> Nvml::load() {
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  int (*init)() = nullptr;
  std::unique_ptr<Nvml> nvml(new Nvml);
  const bool complete =
      find(library, "nvmlInit_v2", init) &&
      find(library, "nvmlDeviceGetHandleByPciBusId_v2", nvml->device_by_pci_bus_id) &&
      find(library, "nvmlDeviceGetClockInfo", nvml->clock) &&
      find(library, "nvmlDeviceGetMaxClockInfo", nvml->max_clock) &&
      find(library, "nvmlDeviceGetPowerUsage", nvml->power) &&
      find(library, "nvmlDeviceGetTemperature", nvml->temperature) &&
      (find(library, "nvmlDeviceGetCurrentClocksEventReasons", nvml->throttle_reasons) ||
       find(library, "nvmlDeviceGetCurrentClocksThrottleReasons", nvml->throttle_reasons)) &&  // before driver 535
      find(library, "nvmlSystemGetDriverVersion", nvml->driver_version);
  if (!complete || init() != 0) return nullptr;
  return nvml;
}

const Nvml* Nvml::get() {
  static const std::unique_ptr<Nvml> nvml = load();
  return nvml.get();
}

}  // namespace lacuna
