#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/device/device.hpp"
#include "lacuna/sdk/context.hpp"

using lacuna::Buffer;
using lacuna::sdk::i64;

TEST_CASE("GPU: buffers make the round trip, in the stream's order") {
  const auto device = lacuna::cuda_device();
  CHECK(device->on_device());
  CHECK(device->describe().find("SMs") != std::string::npos);
  std::vector<int> in(100000), out(in.size());
  std::iota(in.begin(), in.end(), -7);
  const std::size_t bytes = in.size() * sizeof(int);
  Buffer<int> a(device, static_cast<i64>(in.size())), b(device, static_cast<i64>(in.size()));
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 256 == 0);
  device->copy_in(a.data(), in.data(), bytes);
  device->copy(b.data(), a.data(), bytes);
  device->fill(a.data(), 0xff, bytes);
  device->copy_out(out.data(), b.data(), bytes);
  CHECK(out == in);
  device->copy_out(out.data(), a.data(), bytes);
  CHECK(out == std::vector<int>(in.size(), -1));
}

TEST_CASE("GPU: a host-device lambda of the SDK's loop gives the host's bits") {
  const auto device = lacuna::cuda_device();
  const lacuna::sdk::Random random{11, 2};
  constexpr i64 kCount = 70001;  // not a multiple of a block
  Buffer<float> out(device, kCount);
  float* data = out.data();
  const auto stream = static_cast<cudaStream_t>(device->stream());
  auto draw = [=] LACUNA_HD(i64 i) { data[i] = random.uniform(3, static_cast<lacuna::sdk::u64>(i)); };
  lacuna::sdk::detail::for_each_kernel<<<64, 128, 0, stream>>>(kCount, draw);
  REQUIRE(cudaGetLastError() == cudaSuccess);
  std::vector<float> host(kCount);
  device->copy_out(host.data(), data, kCount * sizeof(float));
  i64 wrong = 0;
  for (i64 i = 0; i < kCount; ++i) wrong += host[i] != random.uniform(3, static_cast<lacuna::sdk::u64>(i));
  CHECK(wrong == 0);
}

TEST_CASE("GPU: errors are clear, and the device works on after one") {
  CHECK_THROWS_WITH_AS(lacuna::cuda_device(4096), doctest::Contains("no such GPU"), lacuna::Error);
  const auto device = lacuna::cuda_device();
  CHECK_THROWS_WITH_AS(device->allocate(std::size_t{1} << 50), doctest::Contains("out of device memory"),
                       lacuna::Error);
  Buffer<int> after(device, 16);
  device->fill(after.data(), 0, 16 * sizeof(int));
  device->synchronize();
}
