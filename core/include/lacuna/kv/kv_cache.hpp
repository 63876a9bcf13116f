// The paged KV cache: one sequence of one layer, a page table per KV head, pages from a shared pool.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"
#include "lacuna/trace/rope.hpp"

namespace lacuna {

/// Fixed number of pages of `page_size` tokens of one KV head: K, V [page_size, head_dim] and the tokens' original
/// positions. Pages are reference-counted, so that forks share them. `poison`: freed and never-written slots hold NaN.
class PagePool {
 public:
  PagePool(std::shared_ptr<Device> device, sdk::i32 page_size, sdk::i32 head_dim, sdk::Dtype dtype, sdk::i64 max_pages, bool poison);
  ~PagePool();
  sdk::i64 pages_in_use() const;
  sdk::i64 capacity() const;
  sdk::i64 bytes_per_page() const;  // K + V + positions
  sdk::i64 kv_bytes_per_page() const;  // K + V

 private:
  friend class KvCache;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class KvCache {
 public:
  /// `max_tokens`: longest the sequence will get; sizes the page table.
  KvCache(std::shared_ptr<PagePool> pool, sdk::i32 num_kv_heads, sdk::i64 max_tokens);
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;
  ~KvCache();  // returns its pages

  /// Appends n tokens to every head: k, v [num_kv_heads, (head_stride / head_dim), head_dim], converted to the pool's dtype;
  /// positions first_position, first_position + 1, ... must be larger than every cached one. Copies a shared last page
  /// before writing it. Throws Error when the pool or the table is full; then nothing has changed.
  void append(const void* k, const void* v, sdk::Dtype dtype, sdk::i64 head_stride, sdk::i64 n, sdk::i64 first_position);

  /// A copy-on-write copy: shares every page and side array until one of them writes.
  KvCache fork() const;

  /// Keeps these slots of each head (ascending, unique, may differ in number), in order, and returns the pages that become
  /// empty. Sides that move are carried along; the others are reported by take_dirty. Throws Error for a bad list.
  void retain(const std::vector<std::vector<sdk::i32>>& slots);

  /// StreamingLLM's positions: rotates every cached key by (slot - position), so that it sits at its slot. Positions are kept.
  void compact_positions(const Rope& rope);

  /// Declares side data (before the first index); the core allocates it for max_tokens.
  void add_side(const sdk::Side& side);
  /// [num_kv_heads, units, elements]; writable: copies first if a fork shares it. Throws Error if not declared.
  sdk::Array side(const std::string& name);
  /// Units [begin, end) per head of each side granularity that changed since the last call (appended, compacted): for
  /// `unit_tokens` sized units; two int32 arrays in the cache's memory, valid until the next call.
  sdk::Dirty take_dirty(sdk::i32 unit_tokens);

  sdk::Paged view() const;
  sdk::i64 length(sdk::i32 head) const;
  std::vector<sdk::i32> positions(sdk::i32 head) const;  // host copy
  sdk::i64 pages() const;          // pages its tables reference
  sdk::i64 kv_bytes() const;       // K + V bytes of those pages
  sdk::i64 token_bytes() const;    // K + V bytes of the cached tokens alone
  sdk::i64 side_bytes() const;     // bytes of the sides' units in use

 private:
  struct Impl;
  explicit KvCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lacuna
