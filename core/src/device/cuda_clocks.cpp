#include <cuda_runtime_api.h>

#include "lacuna/device/clocks.hpp"
#include "nvml.hpp"

namespace lacuna {

std::optional<Clocks> read_clocks(int device) {
  const Nvml* nvml = Nvml::get();
  char bus_id[32];
  if (!nvml) return std::nullopt;
  if (cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device) != cudaSuccess) {
    cudaGetLastError();
    return std::nullopt;
  }
  constexpr int kOfTheGpu = 0;  // the sensor
  Nvml::Device handle = nullptr;
  unsigned sm = 0, memory = 0, most = 0, milliwatts = 0, celsius = 0;
  unsigned long long reasons = 0;
  if (nvml->device_by_pci_bus_id(bus_id, &handle) != 0 || nvml->clock(handle, Nvml::kSm, &sm) != 0 ||
      nvml->clock(handle, Nvml::kMemory, &memory) != 0 || nvml->max_clock(handle, Nvml::kSm, &most) != 0 ||
      nvml->power(handle, &milliwatts) != 0 || nvml->temperature(handle, kOfTheGpu, &celsius) != 0 ||
      nvml->throttle_reasons(handle, &reasons) != 0)
    return std::nullopt;
  return Clocks{static_cast<int>(sm), static_cast<int>(memory),     static_cast<int>(most),
                milliwatts / 1000.,   static_cast<double>(celsius), throttle_text(reasons)};
}

}  // namespace lacuna
