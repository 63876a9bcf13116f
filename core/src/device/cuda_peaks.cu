// No fmt here (see cuda.cu).
#include <cuda_runtime.h>

#include <string>

#include "cuda_gemm.hpp"
#include "cuda_stream_read.cuh"
#include "lacuna/device/peaks.hpp"
#include "lacuna/device/timing.hpp"
#include "nvml.hpp"

namespace lacuna {
namespace {

constexpr std::size_t kBytes = std::size_t{1} << 30;  // of each buffer; the L2 cache of an H200 holds a twentieth
constexpr int kGemm = 8192;
constexpr std::size_t kMatrixBytes = std::size_t{2} * kGemm * kGemm, kWorkspaceBytes = std::size_t{32} << 20;
static_assert(2 * kMatrixBytes <= kBytes && kMatrixBytes + kWorkspaceBytes <= kBytes);
constexpr TimingOptions kOptions{5, 20, .1, 1.};
constexpr TimingOptions kGemmOptions{20, 20, .3, 1.};  // longer: the clock falls while the chip grows warm

/// bf16 in (-2, -1] and [1, 2): zeros or equal numbers draw less power and so give higher clocks.
__global__ void random_bf16_kernel(sdk::u16* data, sdk::i64 n, sdk::Random random) {
  const sdk::i64 threads = static_cast<sdk::i64>(gridDim.x) * blockDim.x;
  for (sdk::i64 i = static_cast<sdk::i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) {
    const auto bits = static_cast<sdk::u16>(random.bits(0, static_cast<sdk::u64>(i)));
    data[i] = (bits & 0x807f) | 0x3f80;
  }
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_version() {
  constexpr unsigned kMost = 96;
  char text[kMost];
  const Nvml* nvml = Nvml::get();
  if (nvml && nvml->driver_version(text, kMost) == 0) return text;
  int version = 0;
  check_cuda(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return "CUDA " + version_text(version);
}

DevicePeaks facts() {
  DevicePeaks peaks{};
  int index = 0, runtime = 0;
  cudaDeviceProp p{};
  check_cuda(cudaGetDevice(&index), "cudaGetDevice");
  check_cuda(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check_cuda(cudaMemGetInfo(&peaks.free_bytes, &peaks.memory_bytes), "cudaMemGetInfo");
  peaks.l2_bytes = static_cast<std::size_t>(p.l2CacheSize);
  peaks.sms = p.multiProcessorCount;
  peaks.name = p.name;
  peaks.driver = driver_version();
  peaks.cuda = version_text(runtime);
  return peaks;
}

/// Device memory that goes back with the object.
struct Block {
  Block(Device& device, std::size_t bytes) : device(device), data(static_cast<char*>(device.allocate(bytes))) {}
  Block(const Block&) = delete;
  ~Block() { device.release(data); }
  Device& device;
  char* data;
};

double read_gb_s(Device& device, const Block& a, const Block& b, int sms) {
  constexpr int kByte = 3;
  const auto stream = static_cast<cudaStream_t>(device.stream());
  auto* sum = reinterpret_cast<unsigned*>(b.data);
  device.fill(a.data, kByte, kBytes);
  const auto read = [&] { stream_read(a.data, kBytes, sum, sms, stream); };
  device.fill(sum, 0, sizeof *sum);
  const Timing t = time_work(device, {read}, false, kOptions);
  device.fill(sum, 0, sizeof *sum);
  read();
  unsigned found = 0;
  device.copy_out(&found, sum, sizeof found);
  constexpr unsigned kWord = 0x01010101u * kByte;
  if (found != static_cast<unsigned>(kBytes / sizeof kWord * kWord))
    throw Error({"a streaming read missed a part of its buffer", "", "", "measure_peaks", ""});
  return static_cast<double>(kBytes) / t.median_us / 1e3;
}

double gemm_tflop_s(Device& device, const Block& operands, const Block& product) {
  const auto stream = static_cast<cudaStream_t>(device.stream());
  const auto elements = static_cast<sdk::i64>(2 * kMatrixBytes / sizeof(sdk::u16));
  random_bf16_kernel<<<4096, 256, 0, stream>>>(reinterpret_cast<sdk::u16*>(operands.data), elements, {1, 0});
  check_cuda(cudaGetLastError(), "the launch of random matrices");
  const auto gemm = Gemm::make(kGemm, operands.data, operands.data + kMatrixBytes, product.data,
                               product.data + kMatrixBytes, kWorkspaceBytes);
  if (!gemm) return 0;
  const Timing t = time_work(device, {[&] { gemm->enqueue(stream); }}, false, kGemmOptions);
  device.synchronize();
  return 2. * kGemm * kGemm * kGemm / t.median_us / 1e6;
}

}  // namespace

DevicePeaks measure_peaks(Device& device) {
  if (!device.on_device()) throw Error({"peaks need a GPU", "a CUDA device", device.describe(), "measure_peaks", ""});
  device.synchronize();  // which also makes it the current device
  DevicePeaks peaks = facts();
  const Block a(device, kBytes), b(device, kBytes);
  peaks.read_gb_s = read_gb_s(device, a, b, peaks.sms);
  const Timing copy = time_work(device, {[&] { device.copy(b.data, a.data, kBytes); }}, false, kOptions);
  peaks.copy_gb_s = 2. * static_cast<double>(kBytes) / copy.median_us / 1e3;
  peaks.gemm_tflop_s = gemm_tflop_s(device, a, b);
  return peaks;
}

}  // namespace lacuna
