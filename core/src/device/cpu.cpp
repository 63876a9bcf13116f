#include <fmt/format.h>
#include <omp.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "lacuna/base/error.hpp"
#include "lacuna/device/device.hpp"

namespace lacuna {
namespace {

constexpr std::size_t kAlignment = 256;

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    if (const auto colon = line.find(": "); colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

class CpuDevice final : public Device {
 public:
  bool on_device() const override { return false; }

  std::string describe() const override {
    const double bytes = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
    return fmt::format("{}, {} threads, {:.1f} GiB", cpu_model(), omp_get_max_threads(), bytes / (1ull << 30));
  }

  std::size_t free_bytes() const override {
    return static_cast<std::size_t>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  }

  void* allocate(std::size_t bytes) override {
    const std::size_t rounded = (bytes / kAlignment + 1) * kAlignment;  // aligned_alloc wants a multiple, and not zero
    void* pointer = rounded > bytes ? std::aligned_alloc(kAlignment, rounded) : nullptr;
    if (!pointer) {
      throw Error({"out of host memory", fmt::format("{} bytes", bytes), "none", describe(),
                   "Use a shorter trace, a smaller page pool or fewer workers."});
    }
    return pointer;
  }
  void release(void* pointer) noexcept override { std::free(pointer); }

  void copy_in(void* device, const void* host, std::size_t bytes) override { copy(device, host, bytes); }
  void copy_out(void* host, const void* device, std::size_t bytes) override { copy(host, device, bytes); }
  void copy_out_rows(void* host, const void* device, std::size_t rows, std::size_t row_bytes,
                     std::size_t stride) override {
    for (std::size_t r = 0; r < rows; ++r)
      copy(static_cast<std::byte*>(host) + r * row_bytes, static_cast<const std::byte*>(device) + r * stride,
           row_bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void fill(void* device, int byte, std::size_t bytes) override {
    if (bytes > 0) std::memset(device, byte, bytes);
  }
  void* stream() const override { return nullptr; }
  void synchronize() override {}
};

}  // namespace

std::shared_ptr<Device> cpu_device() {
  static const std::shared_ptr<Device> device = std::make_shared<CpuDevice>();
  return device;
}

std::shared_ptr<Device> device_by_name(const std::string& name) {
  if (name == "cpu") return cpu_device();
  if (name == "cuda") return cuda_device();
  throw Error({"unknown device", "cpu or cuda", "'" + name + "'", "", ""});
}

}  // namespace lacuna
