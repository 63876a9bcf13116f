// A device that passes everything on to another one: tests override what they watch or pretend.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "lacuna/device/device.hpp"

namespace lacuna::testing {

class ForwardingDevice : public Device {
 public:
  explicit ForwardingDevice(std::shared_ptr<Device> to) : to_(std::move(to)) {}
  bool on_device() const override { return to_->on_device(); }
  std::string describe() const override { return to_->describe(); }
  std::size_t free_bytes() const override { return to_->free_bytes(); }
  void* allocate(std::size_t bytes) override { return to_->allocate(bytes); }
  void release(void* pointer) noexcept override { to_->release(pointer); }
  void copy_in(void* to, const void* from, std::size_t bytes) override { to_->copy_in(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) override { to_->copy_out(to, from, bytes); }
  void copy_out_rows(void* to, const void* from, std::size_t rows, std::size_t row_bytes, std::size_t stride) override {
    to_->copy_out_rows(to, from, rows, row_bytes, stride);
  }
  void copy(void* to, const void* from, std::size_t bytes) override { to_->copy(to, from, bytes); }
  void fill(void* to, int byte, std::size_t bytes) override { to_->fill(to, byte, bytes); }
  void* stream() const override { return to_->stream(); }
  void synchronize() override { to_->synchronize(); }

 private:
  std::shared_ptr<Device> to_;
};

}  // namespace lacuna::testing
