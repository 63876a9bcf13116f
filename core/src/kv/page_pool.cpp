#include "page_pool.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "lacuna/base/error.hpp"

namespace lacuna {

using sdk::Dtype, sdk::i32, sdk::i64;

namespace {

constexpr int kPoisonByte = 0xff;  // NaN in f32, f16 and bf16 alike, -1 in a position

void check_shape(i32 page_size, i32 head_dim, Dtype dtype, i64 max_pages) {
  const auto bad = [](const char* what, const std::string& expected, i64 found) {
    throw Error({what, expected, fmt::format("{}", found), "page pool", ""});
  };
  if (page_size < 1) bad("bad page size", "at least 1 token", page_size);
  if (head_dim < 1) bad("bad head size", "at least 1 channel", head_dim);
  // Tables are int32 and one more page, the null page, is stored.
  const i64 most = std::numeric_limits<i32>::max() / page_size - 1;
  if (max_pages < 1 || max_pages > most) bad("bad number of pages", fmt::format("1 to {}", most), max_pages);
  if (dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) {
    throw Error({"bad element type of the KV cache", "f32, f16 or bf16", "an integer type", "page pool", ""});
  }
}

}  // namespace

PagePool::Impl::Impl(std::shared_ptr<Device> device_in, i32 page_size_in, i32 head_dim_in, Dtype dtype_in,
                     i64 max_pages_in, bool poison_in)
    : device(std::move(device_in)),
      page_size(page_size_in),
      head_dim(head_dim_in),
      dtype(dtype_in),
      max_pages(max_pages_in),
      poison(poison_in) {
  check_shape(page_size, head_dim, dtype, max_pages);
  moves = make_moves(*device);
  const i64 slots = (max_pages + 1) * page_size, bytes = slots * head_dim * sdk::size_of(dtype);
  k = Buffer<std::byte>(device, bytes);
  v = Buffer<std::byte>(device, bytes);
  position = Buffer<i32>(device, slots);
  references_.assign(static_cast<std::size_t>(max_pages), 0);
  free_.resize(static_cast<std::size_t>(max_pages));
  std::iota(free_.begin(), free_.end(), 0);  // ascending is a heap
  // Pages are copied whole, whatever is written of them.
  if (device->on_device() && !poison)
    for (const Buffer<std::byte>* array : {&k, &v}) device->fill(array->data(), 0, static_cast<std::size_t>(bytes));
  fill_slots(static_cast<i64>(poison ? 0 : null_page()) * page_size, slots);
}

i32 PagePool::Impl::acquire() noexcept {
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const i32 page = free_.back();
  free_.pop_back();
  references_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PagePool::Impl::release(i32 page) noexcept {
  if (--references_[static_cast<std::size_t>(page)] > 0) return;
  try {
    poison_slots(page, 0);
  } catch (const Error&) {
    // Only a broken device gets here; its next use reports it, and the page must not be lost.
  }
  free_.push_back(page);  // its capacity is max_pages from the start
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

void PagePool::Impl::copy_page(i32 to, i32 from) {
  const i64 bytes = static_cast<i64>(page_size) * head_dim * sdk::size_of(dtype);
  for (const Buffer<std::byte>* array : {&k, &v}) {
    device->copy(array->data() + to * bytes, array->data() + from * bytes, static_cast<std::size_t>(bytes));
  }
  device->copy(position.data() + static_cast<i64>(to) * page_size, position.data() + static_cast<i64>(from) * page_size,
               static_cast<std::size_t>(page_size) * sizeof(i32));
}

void PagePool::Impl::poison_slots(i32 page, i32 from_slot) {
  const i64 first = static_cast<i64>(page) * page_size;
  if (poison && from_slot < page_size) fill_slots(first + from_slot, first + page_size);
}

void PagePool::Impl::fill_slots(i64 begin, i64 end) {
  const i64 row_bytes = head_dim * sdk::size_of(dtype);
  for (const Buffer<std::byte>* array : {&k, &v}) {
    device->fill(array->data() + begin * row_bytes, kPoisonByte, static_cast<std::size_t>((end - begin) * row_bytes));
  }
  device->fill(position.data() + begin, kPoisonByte, static_cast<std::size_t>(end - begin) * sizeof(i32));
}

PagePool::PagePool(std::shared_ptr<Device> device, i32 page_size, i32 head_dim, Dtype dtype, i64 max_pages, bool poison)
    : impl_(std::make_unique<Impl>(std::move(device), page_size, head_dim, dtype, max_pages, poison)) {}
PagePool::~PagePool() = default;

i64 PagePool::pages_in_use() const { return impl_->max_pages - impl_->available(); }
i64 PagePool::capacity() const { return impl_->max_pages; }
i64 PagePool::kv_bytes_per_page() const {
  return 2 * static_cast<i64>(impl_->page_size) * impl_->head_dim * sdk::size_of(impl_->dtype);
}
i64 PagePool::bytes_per_page() const { return kv_bytes_per_page() + impl_->page_size * static_cast<i64>(sizeof(i32)); }

}  // namespace lacuna
