// One GPU and one stream of it. Memory comes from the device's pool in stream order: a replay makes and drops caches by
// the hundred, and cudaMalloc and cudaFree would wait for the GPU each time. No fmt here: nvcc 13 cannot evaluate fmt
// 9's compile-time check of formats.
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda_check.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/device/device.hpp"

namespace lacuna {
namespace {

std::string name_of(int index) { return "cuda:" + std::to_string(index); }

void check(cudaError_t status, const char* call, int index) { check_cuda(status, call, name_of(index)); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    use();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate", index_);
    check(cudaDeviceGetDefaultMemPool(&pool_, index_), "cudaDeviceGetDefaultMemPool", index_);
    std::uint64_t keep = UINT64_MAX;  // what is released stays in the pool
    check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute", index_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override {
    cudaSetDevice(index_);
    cudaStreamDestroy(stream_);
  }

  bool on_device() const override { return true; }

  std::string describe() const override {
    cudaDeviceProp p{};
    check(cudaGetDeviceProperties(&p, index_), "cudaGetDeviceProperties", index_);
    return std::string(p.name) + ", sm_" + std::to_string(p.major) + std::to_string(p.minor) + ", " +
           std::to_string(p.multiProcessorCount) + " SMs, " + std::to_string(p.totalGlobalMem >> 30) + " GiB";
  }

  std::size_t free_bytes() const override {
    use();
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", index_);
    std::uint64_t reserved = 0, used = 0;
    check(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved), "cudaMemPoolGetAttribute",
          index_);
    check(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrUsedMemCurrent, &used), "cudaMemPoolGetAttribute", index_);
    return free + static_cast<std::size_t>(reserved - used);
  }

  void* allocate(std::size_t bytes) override {
    use();
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &capture), "cudaStreamIsCapturing", index_);
    if (capture != cudaStreamCaptureStatusNone)
      throw Error({"memory is asked for while a CUDA graph is captured", "memory that was taken before",
                   std::to_string(bytes) + " bytes more", name_of(index_), ""});
    void* pointer = nullptr;
    cudaError_t status = cudaMallocAsync(&pointer, bytes > 0 ? bytes : 1, stream_);
    if (status == cudaErrorMemoryAllocation) {  // what the pool keeps may be in pieces that are too small
      cudaGetLastError();
      synchronize();
      check(cudaMemPoolTrimTo(pool_, 0), "cudaMemPoolTrimTo", index_);
      status = cudaMallocAsync(&pointer, bytes > 0 ? bytes : 1, stream_);
    }
    if (status != cudaSuccess) {
      if (status != cudaErrorMemoryAllocation) check(status, "cudaMallocAsync", index_);
      cudaGetLastError();
      std::size_t free_bytes = 0, total_bytes = 0;
      check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo", index_);
      throw Error({"out of device memory", std::to_string(bytes) + " bytes",
                   std::to_string(free_bytes) + " of " + std::to_string(total_bytes) + " bytes free", name_of(index_),
                   "Use a shorter trace, a smaller page pool or one worker a GPU."});
    }
    return pointer;
  }
  void release(void* pointer) noexcept override {
    cudaSetDevice(index_);
    cudaFreeAsync(pointer, stream_);
  }

  void copy_in(void* device, const void* host, std::size_t bytes) override {
    transfer(device, host, bytes, cudaMemcpyHostToDevice);
  }
  void copy_out(void* host, const void* device, std::size_t bytes) override {
    transfer(host, device, bytes, cudaMemcpyDeviceToHost);
    synchronize();
  }
  void copy_out_rows(void* host, const void* device, std::size_t rows, std::size_t row_bytes,
                     std::size_t stride) override {
    use();
    if (rows > 0 && row_bytes > 0)
      check(cudaMemcpy2DAsync(host, row_bytes, device, stride, row_bytes, rows, cudaMemcpyDeviceToHost, stream_),
            "cudaMemcpy2DAsync", index_);
    synchronize();
  }
  void copy(void* to, const void* from, std::size_t bytes) override {
    transfer(to, from, bytes, cudaMemcpyDeviceToDevice);
  }
  void fill(void* device, int byte, std::size_t bytes) override {
    use();
    check(cudaMemsetAsync(device, byte, bytes, stream_), "cudaMemsetAsync", index_);
  }
  void* stream() const override { return stream_; }
  void synchronize() override {
    use();
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize", index_);
  }

 private:
  // The current device belongs to the thread, and a caller may come from any.
  void use() const { check(cudaSetDevice(index_), "cudaSetDevice", index_); }

  void transfer(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    use();
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync", index_);
  }

  int index_;
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
};

}  // namespace

std::shared_ptr<Device> cuda_device(int index) {
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    cudaGetLastError();
    throw Error({"no usable GPU", "an NVIDIA GPU with a driver for this CUDA", cudaGetErrorString(status), "",
                 "Use device = \"cpu\", or install the driver."});
  }
  if (index < 0 || index >= count) {
    throw Error({"no such GPU", "an index below " + std::to_string(count), std::to_string(index), "",
                 "Choose a device that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide."});
  }
  return std::make_shared<CudaDevice>(index);
}

}  // namespace lacuna
