// What a GPU reaches on work that is nothing but memory traffic or matrix products: the scale for measured times.
#pragma once

#include <cstddef>
#include <string>

#include "lacuna/device/device.hpp"

namespace lacuna {

struct DevicePeaks {
  double copy_gb_s;     // device to device, bytes read and bytes written counted; GB = 1e9 bytes
  double read_gb_s;     // streaming read, nothing written
  double gemm_tflop_s;  // bf16, 8192 x 8192 x 8192, random operands, by cuBLASLt; 0: the library is not there
  std::size_t l2_bytes, memory_bytes, free_bytes;  // free: before the measurement
  int sms;
  std::string name, driver, cuda;  // versions: of the driver (or, without NVML, the CUDA it serves), of the runtime
};

/// Medians of replays, about a second in all; takes 2 GiB of device memory and releases them. Throws Error on a CPU
/// device, when memory is short, and when a read did not see the whole buffer.
DevicePeaks measure_peaks(Device& device);

}  // namespace lacuna
