// The pool's inside: storage, reference counts and the free list.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "lacuna/kv/kv_cache.hpp"
#include "moves.hpp"

namespace lacuna {

struct PagePool::Impl {
  Impl(std::shared_ptr<Device> device, sdk::i32 page_size, sdk::i32 head_dim, sdk::Dtype dtype, sdk::i64 max_pages,
       bool poison);

  sdk::i64 available() const { return static_cast<sdk::i64>(free_.size()); }
  /// Takes the free page of the lowest id, so that equal histories give equal tables. available() must be positive.
  sdk::i32 acquire() noexcept;
  void share(sdk::i32 page) noexcept { ++references_[static_cast<std::size_t>(page)]; }
  bool shared(sdk::i32 page) const { return references_[static_cast<std::size_t>(page)] > 1; }
  /// Drops one reference; the last one returns the page to the free list.
  void release(sdk::i32 page) noexcept;

  void copy_page(sdk::i32 to, sdk::i32 from);
  /// With poison: NaN in the slots [from_slot, page_size) of the page, position -1. Without: nothing.
  void poison_slots(sdk::i32 page, sdk::i32 from_slot);
  PageArrays arrays() const { return {k.data(), v.data(), position.data(), dtype, page_size, head_dim}; }
  /// A page that is never handed out and always NaN: what table entries past a sequence's pages name, so that a read
  /// beyond the length shows instead of touching foreign memory.
  sdk::i32 null_page() const { return static_cast<sdk::i32>(max_pages); }
  sdk::i64 pages_of(sdk::i64 tokens) const { return (tokens + page_size - 1) / page_size; }

  std::shared_ptr<Device> device;
  sdk::i32 page_size, head_dim;
  sdk::Dtype dtype;
  sdk::i64 max_pages;
  bool poison;
  std::unique_ptr<Moves> moves;
  Buffer<std::byte> k, v;
  Buffer<sdk::i32> position;

 private:
  void fill_slots(sdk::i64 begin, sdk::i64 end);

  std::vector<sdk::i32> references_;
  std::vector<sdk::i32> free_;  // binary heap, lowest id on top
};

}  // namespace lacuna
