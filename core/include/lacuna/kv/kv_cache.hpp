// The paged KV cache: one sequence of one layer, a page table per KV head, pages from a shared pool.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"
#include "lacuna/trace/rope.hpp"

namespace lacuna {

/// Fixed number of pages of `page_size` tokens of one KV head: K, V [page_size, head_dim] (f32, f16 or bf16) and the
/// tokens' original positions. Pages are reference-counted, so that forks share them; a free page of the lowest id is
/// taken first, so equal histories give equal tables. `poison`: freed and never-written slots hold NaN, position -1. A
/// pool and its caches are used by one thread at a time. Throws Error for a bad shape, too little memory or a device
/// without a backend.
class PagePool {
 public:
  PagePool(std::shared_ptr<Device> device, sdk::i32 page_size, sdk::i32 head_dim, sdk::Dtype dtype, sdk::i64 max_pages,
           bool poison);
  ~PagePool();
  sdk::i64 pages_in_use() const;
  sdk::i64 capacity() const;
  sdk::i64 bytes_per_page() const;     // K + V + positions
  sdk::i64 kv_bytes_per_page() const;  // K + V

 private:
  friend class KvCache;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Every function that throws Error for a bad argument, a full pool or too little memory leaves the cache, its forks
/// and the pool as they were. Pointers from view(), side() and take_dirty() are memory of the pool's device and good
/// until the next call that changes the cache; work is ordered on the device's stream.
class KvCache {
 public:
  /// `max_tokens`: longest the sequence will get; sizes the page table.
  KvCache(std::shared_ptr<PagePool> pool, sdk::i32 num_kv_heads, sdk::i64 max_tokens);
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;
  ~KvCache();  // returns its pages

  /// Appends n tokens to every head: k, v [num_kv_heads, (head_stride / head_dim), head_dim] in the device's memory,
  /// converted to the pool's dtype (round to nearest even); positions first_position, first_position + 1, ... must be
  /// larger than every cached one. Copies a shared last page before writing it. Throws Error when the pool or the table
  /// is full; then nothing has changed.
  void append(const void* k, const void* v, sdk::Dtype dtype, sdk::i64 head_stride, sdk::i64 n,
              sdk::i64 first_position);

  /// A copy-on-write copy: shares every page and side array until one of them writes. It inherits what is dirty.
  KvCache fork() const;

  /// Keeps these slots of each head (ascending, unique, may differ in number), in order, and returns the pages that
  /// become empty. Pages before the first dropped slot stay as they are, shared ones too; from there on tokens move
  /// inside the sequence's own pages, and a shared page is replaced by a new one (also the one that is only cut short:
  /// the next append would have to copy it anyway). Sides that move are carried along; the others are reported by
  /// take_dirty. Throws Error for a bad list, or when the pool lacks pages to replace shared ones.
  void retain(const std::vector<std::vector<sdk::i32>>& slots);

  /// StreamingLLM's positions: rotates every cached key by (slot - position), so that it sits at its slot. Positions
  /// are kept. The cache remembers the position that each key carries (per slot, on the host, moved by retain and
  /// inherited by forks), so that a later call rotates by (slot - carried position), and only keys that moved or came
  /// since. Each such step rounds once to the pool's dtype: a 16-bit key that moves every step drifts. Sides' units of
  /// rotated keys become dirty, those of sides that move too. Throws Error when the pool lacks pages to replace shared
  /// ones.
  void compact_positions(const Rope& rope);

  /// Replaces the content of every cached token: slot i of head h takes row from[h * slots + i] of that head's k and v
  /// [num_kv_heads, slots, head_dim], rounded to the pool's dtype; all three in the device's memory, `slots` at least
  /// the longest head. Shared pages are copied first. Units of all sides become dirty. Throws Error when the pool lacks
  /// pages to replace shared ones.
  void overwrite(const float* k, const float* v, const sdk::i32* from, sdk::i64 slots);

  /// The keys at slots below until[h] are held without channels[h] of their channels, if not without more already:
  /// what kv_bytes() and token_bytes() count. retain moves it along, forks inherit it; the content is the caller's.
  void drop_key_channels(const std::vector<sdk::i32>& until, const std::vector<sdk::i32>& channels);

  /// Declares side data (before the first index); the core allocates it for max_tokens. Units start as zeros when they
  /// come into use; with `poison`, float sides are NaN beyond.
  void add_side(const sdk::Side& side);
  /// [num_kv_heads, units, elements]; writable: copies first if a fork shares it. Throws Error if not declared.
  sdk::Array side(const std::string& name);
  /// Units [begin, end) per head of each side granularity that changed since the last call (appended, compacted): for
  /// `unit_tokens` sized units; two int32 arrays in the cache's memory, valid until the next call. A unit counts as
  /// changed when its tokens do: the partial last one at each append or cut. If every side of this granularity moves
  /// along on retain, units that were up to date stay so.
  sdk::Dirty take_dirty(sdk::i32 unit_tokens);

  sdk::Paged view() const;
  sdk::i64 length(sdk::i32 head) const;
  std::vector<sdk::i32> positions(sdk::i32 head) const;  // on the host; does not synchronise
  sdk::i64 pages() const;                                // pages its tables reference
  sdk::i64 kv_bytes() const;                             // K + V bytes of those pages, without dropped channels
  sdk::i64 token_bytes() const;                          // K + V bytes of the cached tokens alone, likewise
  sdk::i64 side_bytes() const;                           // bytes of the sides' units in use

 private:
  struct Impl;
  sdk::i64 dropped_bytes() const;
  explicit KvCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lacuna
