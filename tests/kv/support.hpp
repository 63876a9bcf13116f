// A naive model of the cache (vectors of tokens) and what compares the two. The cases run on the CPU in one program and
// on the GPU in another; what they read of a cache is downloaded first.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "forwarding_device.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/kv/kv_cache.hpp"

namespace kv_test {

using namespace lacuna;
using sdk::Dtype, sdk::i32, sdk::i64, sdk::u16, sdk::u8;

#if defined(LACUNA_GPU_TESTS)
inline constexpr bool kOnGpu = true;
#else
inline constexpr bool kOnGpu = false;
#endif

/// Where the caches of this program live.
inline std::shared_ptr<Device> test_device() {
  static const std::shared_ptr<Device> device = kOnGpu ? cuda_device() : cpu_device();
  return device;
}

template <class T>
std::vector<T> download(const T* data, i64 n, Device& device = *test_device()) {
  std::vector<T> out(static_cast<std::size_t>(n));
  if (n > 0) device.copy_out(out.data(), data, out.size() * sizeof(T));
  return out;
}
template <class T>
Buffer<T> upload(const std::vector<T>& host, const std::shared_ptr<Device>& device = test_device()) {
  Buffer<T> out(device, static_cast<i64>(host.size()));
  if (!host.empty()) device->copy_in(out.data(), host.data(), host.size() * sizeof(T));
  return out;
}

/// A cache's view over host copies. `pages`: physical ones to copy; -1: as many as the tables name.
class HostView {
 public:
  explicit HostView(const KvCache& cache, i64 pages = -1, Device& device = *test_device()) : kv(cache.view()) {
    table = download(kv.table, static_cast<i64>(kv.rows) * kv.max_pages, device);
    length = download(kv.length, kv.rows, device);
    if (pages < 0) pages = *std::max_element(table.begin(), table.end()) + i64{1};
    const i64 slots = pages * kv.page_size, bytes = slots * kv.head_dim * sdk::size_of(kv.dtype);
    position = download(kv.position, slots, device);
    k = download(static_cast<const std::byte*>(kv.k), bytes, device);
    v = download(static_cast<const std::byte*>(kv.v), bytes, device);
    kv.table = table.data();
    kv.length = length.data();
    kv.position = position.data();
    kv.k = k.data();
    kv.v = v.data();
  }
  HostView(const HostView&) = delete;

  sdk::Paged kv;
  std::vector<i32> table, length, position;
  std::vector<std::byte> k, v;
};

/// A host copy of a side [heads, units, elements].
template <class T>
class SideCopy {
 public:
  explicit SideCopy(const sdk::Array& array)
      : array_(array), data_(download(static_cast<const T*>(array.data), array.extent[0] * array.stride[0])) {}
  T& at(i64 head, i64 unit, i64 e = 0) {
    return data_[static_cast<std::size_t>(head * array_.stride[0] + unit * array_.stride[1] + e * array_.stride[2])];
  }
  void write_back() { test_device()->copy_in(array_.data, data_.data(), data_.size() * sizeof(T)); }

 private:
  sdk::Array array_;
  std::vector<T> data_;
};

/// The value that storing x in the dtype leaves.
inline float rounded(float x, Dtype t) {
  if (t == Dtype::bf16) return sdk::from_bf16(sdk::to_bf16(x));
  return t == Dtype::f16 ? sdk::from_f16(sdk::to_f16(x)) : x;
}

struct Token {
  i32 position = 0, carried = 0;  // carried: the position that the key is rotated for
  std::vector<float> k, v;        // as stored
  float sum = 0;                  // a side that moves along
  bool taken = false;             // reported by take_dirty(1)
};
using Model = std::vector<std::vector<Token>>;  // [heads][slots]

/// n tokens of every head, as append wants them, in f32.
struct Batch {
  std::vector<float> k, v;
  i64 n, first_position;
  Batch(i32 heads, i32 head_dim, i64 n_in, i64 first, unsigned seed) : n(n_in), first_position(first) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    k.resize(static_cast<std::size_t>(heads * n * head_dim));
    v.resize(k.size());
    for (float& x : k) x = normal(rng);
    for (float& x : v) x = normal(rng);
  }
  void append_to(KvCache& cache, i32 head_dim) const {
    const Buffer<float> on_device_k = upload(k), on_device_v = upload(v);
    cache.append(on_device_k.data(), on_device_v.data(), Dtype::f32, n * head_dim, n, first_position);
  }
  void append_to(Model& model, i32 head_dim, Dtype stored) const {
    for (std::size_t h = 0; h < model.size(); ++h) {
      for (i64 i = 0; i < n; ++i) {
        Token token;
        token.position = token.carried = static_cast<i32>(first_position + i);
        for (i64 c = 0; c < head_dim; ++c) {
          const auto at = static_cast<std::size_t>((static_cast<i64>(h) * n + i) * head_dim + c);
          token.k.push_back(rounded(k[at], stored));
          token.v.push_back(rounded(v[at], stored));
        }
        model[h].push_back(std::move(token));
      }
    }
  }
};

inline void retain(Model& model, const std::vector<std::vector<i32>>& slots) {
  for (std::size_t h = 0; h < model.size(); ++h) {
    std::vector<Token> kept;
    for (const i32 s : slots[h]) kept.push_back(model[h][static_cast<std::size_t>(s)]);
    model[h] = std::move(kept);
  }
}

/// Number of places where the cache and the model differ (0 is right); counting keeps the output readable.
inline i64 differences(const KvCache& cache, const Model& model, bool poison) {
  const HostView host(cache);
  const sdk::Paged& kv = host.kv;
  i64 wrong = kv.rows != static_cast<i32>(model.size());
  for (i32 h = 0; h < kv.rows; ++h) {
    const auto& tokens = model[static_cast<std::size_t>(h)];
    const std::vector<i32> positions = cache.positions(h);
    wrong += kv.length[h] != static_cast<i32>(tokens.size()) || cache.length(h) != kv.length[h] ||
             positions.size() != tokens.size() || kv.max_length < kv.length[h];
    if (wrong) return wrong;
    for (i32 s = 0; s < kv.length[h]; ++s) {
      const Token& token = tokens[static_cast<std::size_t>(s)];
      wrong += kv.position_of(h, s) != token.position || positions[static_cast<std::size_t>(s)] != token.position;
      wrong += s > 0 && kv.position_of(h, s) <= kv.position_of(h, s - 1);
      for (i32 c = 0; c < kv.head_dim; ++c) {
        wrong += kv.key(h, s, c) != token.k[static_cast<std::size_t>(c)];
        wrong += kv.value(h, s, c) != token.v[static_cast<std::size_t>(c)];
      }
    }
    for (i64 s = kv.length[h]; poison && s < static_cast<i64>(kv.max_pages) * kv.page_size; ++s) {
      for (i32 c = 0; c < kv.head_dim; ++c) wrong += !std::isnan(kv.key(h, s, c)) || !std::isnan(kv.value(h, s, c));
    }
  }
  return wrong;
}

/// The physical pages that a cache's tables name.
inline std::vector<i32> physical_pages(const KvCache& cache, i32 head) {
  const sdk::Paged kv = cache.view();
  return download(kv.table + head * kv.max_pages, (cache.length(head) + kv.page_size - 1) / kv.page_size);
}
inline i64 distinct_pages(const std::vector<const KvCache*>& caches) {
  std::set<i32> pages;
  for (const KvCache* cache : caches) {
    for (i32 h = 0; h < cache->view().rows; ++h) {
      for (const i32 p : physical_pages(*cache, h)) pages.insert(p);
    }
  }
  return static_cast<i64>(pages.size());
}

inline std::vector<i32> iota(i32 begin, i32 end) {
  std::vector<i32> out;
  for (i32 i = begin; i < end; ++i) out.push_back(i);
  return out;
}

/// A device whose allocations can be told to fail.
class FailingDevice final : public lacuna::testing::ForwardingDevice {
 public:
  FailingDevice() : ForwardingDevice(test_device()) {}
  int left = -1;  // allocations that still succeed; -1: all

  std::string describe() const override { return "a device that runs out of memory"; }
  void* allocate(std::size_t bytes) override {
    if (left == 0) throw Error({"out of memory", "", "", "", ""});
    if (left > 0) --left;
    return ForwardingDevice::allocate(bytes);
  }
};

}  // namespace kv_test
