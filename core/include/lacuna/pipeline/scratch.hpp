// Memory of the steps of one layer: arrays that live until the step is over, on the device where the cache is.
#pragma once

#include <memory>
#include <vector>

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// A stack of arrays. Memory once taken is kept, so that a step of the same shape allocates nothing and finds its
/// arrays at the same addresses: what a CUDA graph needs. Used by one thread and one stream at a time.
class Scratch {
 public:
  explicit Scratch(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  Scratch(const Scratch&) = delete;

  Device& device() const { return *device_; }
  const std::shared_ptr<Device>& shared_device() const { return device_; }
  bool on_device() const { return device_->on_device(); }

  /// n elements, 256-byte aligned, uninitialised, until the frame that is open now closes. Throws Error when memory is
  /// short.
  template <class T>
  T* take(sdk::i64 n) {
    return static_cast<T*>(take_bytes(n * static_cast<sdk::i64>(sizeof(T))));
  }
  /// Filled with zero bits.
  template <class T>
  T* take_zero(sdk::i64 n) {
    T* out = take<T>(n);
    device_->fill(out, 0, static_cast<std::size_t>(n) * sizeof(T));
    return out;
  }
  /// A copy of host memory.
  template <class T>
  T* take_copy(const T* host, sdk::i64 n) {
    T* out = take<T>(n);
    device_->copy_in(out, host, static_cast<std::size_t>(n) * sizeof(T));
    return out;
  }
  /// The array on the host; waits for the device.
  template <class T>
  std::vector<T> read(const T* array, sdk::i64 n) {
    std::vector<T> out(static_cast<std::size_t>(n));
    device_->copy_out(out.data(), array, out.size() * sizeof(T));
    return out;
  }

  /// Room that every operation of sdk::Ops may use; the same memory at each call, grown when more is asked for.
  void* ops_workspace(std::size_t bytes);

  /// Gives back what was taken while it lived. Frames close in the reverse order.
  class Frame {
   public:
    explicit Frame(Scratch& scratch) : scratch_(scratch), chunk_(scratch.chunk_), used_(scratch.used_) {}
    ~Frame() {
      scratch_.chunk_ = chunk_;
      scratch_.used_ = used_;
    }
    Frame(const Frame&) = delete;

   private:
    Scratch& scratch_;
    std::size_t chunk_;
    sdk::i64 used_;
  };

 private:
  void* take_bytes(sdk::i64 bytes);

  std::shared_ptr<Device> device_;
  std::vector<Buffer<std::byte>> chunks_;
  std::size_t chunk_ = 0;  // at work, and how much of it is taken
  sdk::i64 used_ = 0;
  Buffer<std::byte> ops_;
};

}  // namespace lacuna
