// The few calls of NVML that are read, looked up in the driver's library at run time: it is on every machine with a
// driver and on no other, and its header comes with neither.
#pragma once

#include <memory>
#include <string>

namespace lacuna {

class Nvml {
 public:
  using Device = void*;
  enum ClockType { kSm = 1, kMemory = 2 };

  /// Null where the library, one of the calls or a driver is missing. Loaded once, never unloaded.
  static const Nvml* get();

  int (*device_by_pci_bus_id)(const char*, Device*);
  int (*clock)(Device, int, unsigned*);      // MHz
  int (*max_clock)(Device, int, unsigned*);  // MHz
  int (*power)(Device, unsigned*);           // mW
  int (*temperature)(Device, int, unsigned*);
  int (*throttle_reasons)(Device, unsigned long long*);
  int (*driver_version)(char*, unsigned);

 private:
  Nvml() = default;
  static std::unique_ptr<Nvml> load();
};

}  // namespace lacuna
