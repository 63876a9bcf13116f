#include "lacuna/device/device.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "lacuna/base/error.hpp"

using lacuna::Buffer;

TEST_CASE("CPU: buffers are aligned, hold what is copied in, and move") {
  const auto device = lacuna::cpu_device();
  CHECK_FALSE(device->on_device());
  CHECK(device->stream() == nullptr);
  CHECK(device->describe().find("threads") != std::string::npos);

  std::vector<int> in(1000), out(1000);
  std::iota(in.begin(), in.end(), 5);
  Buffer<int> a(device, 1000), b(device, 1000);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 256 == 0);
  device->copy_in(a.data(), in.data(), sizeof(int) * in.size());
  device->copy(b.data(), a.data(), sizeof(int) * in.size());
  device->copy_out(out.data(), b.data(), sizeof(int) * in.size());
  CHECK(out == in);
  device->fill(b.data(), 0xff, sizeof(int) * 10);
  CHECK(b[9] == -1);
  CHECK(b[10] == 15);

  Buffer<int> moved(std::move(a));
  CHECK(a.data() == nullptr);
  CHECK(a.size() == 0);
  CHECK(moved[999] == 1004);
  moved = Buffer<int>(device, 3);
  CHECK(moved.size() == 3);
  CHECK(Buffer<int>(device, 0).data() == nullptr);
}

TEST_CASE("CPU: nothing of nothing, and too much") {
  const auto device = lacuna::cpu_device();
  void* pointer = device->allocate(0);
  CHECK(pointer != nullptr);
  device->copy(pointer, nullptr, 0);
  device->release(pointer);
#if !defined(__SANITIZE_ADDRESS__)  // which ends the program instead of returning null
  CHECK_THROWS_WITH_AS(device->allocate(std::size_t{1} << 62), doctest::Contains("out of host memory"), lacuna::Error);
#endif
  CHECK_THROWS_AS(device->allocate(SIZE_MAX), lacuna::Error);
}

TEST_CASE("a GPU is there, or the error says what to do without one") {
  try {
    const auto device = lacuna::cuda_device();
    CHECK(device->on_device());
  } catch (const lacuna::Error& e) {
    CHECK(e.problem().remedy.find("device = \"cpu\"") != std::string::npos);
  }
}
