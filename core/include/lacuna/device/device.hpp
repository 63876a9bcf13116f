// One handle for the place where arrays live and kernels run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace lacuna {

/// Memory and stream of one backend. All functions throw Error; copies are ordered on the stream.
class Device {
 public:
  virtual ~Device() = default;
  virtual bool on_device() const = 0;                // false: CPU
  virtual std::string describe() const = 0;          // for the header of a table: model, cores or SMs, memory
  virtual std::size_t free_bytes() const = 0;        // that could be allocated now
  virtual void* allocate(std::size_t bytes) = 0;     // 256-byte aligned, uninitialised
  virtual void release(void* pointer) noexcept = 0;  // after the work that is enqueued already
  virtual void copy_in(void* device, const void* host, std::size_t bytes) = 0;
  virtual void copy_out(void* host, const void* device, std::size_t bytes) = 0;  // synchronises
  /// The first row_bytes of each of `rows` rows that are `stride` bytes apart on the device, packed; synchronises.
  virtual void copy_out_rows(void* host, const void* device, std::size_t rows, std::size_t row_bytes,
                             std::size_t stride) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;  // device to device
  virtual void fill(void* device, int byte, std::size_t bytes) = 0;
  virtual void* stream() const = 0;  // cudaStream_t, or null
  virtual void synchronize() = 0;
};

std::shared_ptr<Device> cpu_device();
/// Throws Error when the build has no CUDA or the machine no GPU.
std::shared_ptr<Device> cuda_device(int index = 0);

/// "cpu" or "cuda" (the first GPU). Throws as cuda_device.
std::shared_ptr<Device> device_by_name(const std::string& name);

/// Owned, fixed-size array of trivially copyable T.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::shared_ptr<Device> device, std::int64_t n) : device_(std::move(device)), size_(n) {
    if (n > 0) data_ = static_cast<T*>(device_->allocate(static_cast<std::size_t>(n) * sizeof(T)));
  }
  Buffer(Buffer&& o) noexcept
      : device_(std::move(o.device_)), data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(device_, o.device_);
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (data_) device_->release(data_);
  }
  T* data() const { return data_; }
  std::int64_t size() const { return size_; }
  T& operator[](std::int64_t i) const { return data_[i]; }  // host memory only

 private:
  std::shared_ptr<Device> device_;
  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace lacuna
