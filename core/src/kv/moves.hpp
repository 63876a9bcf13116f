// What moves bytes inside the cache. The cache decides which page holds what (on the host, the same for every backend);
// a backend carries it out on its device's stream. All pointers are memory of that device unless said otherwise.
#pragma once

#include <memory>

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"
#include "lacuna/trace/rope.hpp"

namespace lacuna {

/// The pool's storage: k, v [pages, page_size, head_dim], position [pages, page_size].
struct PageArrays {
  void *k, *v;
  sdk::i32* position;
  sdk::Dtype dtype;
  sdk::i32 page_size, head_dim;
};

/// table [heads, max_pages]: physical page of each logical one.
struct PageTable {
  const sdk::i32* table;
  sdk::i32 heads, max_pages;

  LACUNA_HD sdk::i64 physical(sdk::i64 head, sdk::i64 slot, sdk::i32 page_size) const {
    return static_cast<sdk::i64>(table[head * max_pages + slot / page_size]) * page_size + slot % page_size;
  }
};

/// n tokens a head, head h at element h * head_stride of k and v; positions first_position, first_position + 1, ...
struct NewTokens {
  const void *k, *v;
  sdk::Dtype dtype;
  sdk::i64 head_stride, n, first_position;
};

/// k, v [heads, slots, head_dim]: slot i of head h takes row from[h * slots + i] of that head.
struct NewContent {
  const float *k, *v;
  const sdk::i32* from;
  sdk::i64 slots;
};

/// Slot i of head h, begin[h] <= i < indptr[h + 1] - indptr[h], takes what slot from[indptr[h] + i] holds. from is
/// ascending with from[i] >= i, so that moving in place in ascending i never reads a slot that was already overwritten.
struct Gather {
  sdk::i32 heads;
  const sdk::i64* indptr;
  const sdk::i32 *from, *begin;
};

/// Every function enqueues its work on the device's stream and returns: none allocates or synchronises. No two threads
/// write the same place, so equal calls give equal bits.
class Moves {
 public:
  virtual ~Moves() = default;
  /// Writes the tokens to slots length[h], length[h] + 1, ... of each head, converted to the pages' dtype (round to
  /// nearest even), and their positions.
  virtual void append(const PageArrays& pages, const PageTable& to, const sdk::i32* length,
                      const NewTokens& tokens) const = 0;
  /// K, V and positions; where the tables name the same page the move is in place.
  virtual void gather_pages(const PageArrays& pages, const PageTable& from, const PageTable& to,
                            const Gather& gather) const = 0;
  /// In place on a side of `token_bytes` a token, heads head_bytes apart.
  virtual void gather_side(void* side, sdk::i64 head_bytes, sdk::i64 token_bytes, const Gather& gather) const = 0;
  /// Rotates the key of slot i of head h by delta[indptr[h] + i] positions, in fp32; 0 leaves the bits alone.
  virtual void rotate_keys(const PageArrays& pages, const PageTable& table, const sdk::i64* indptr,
                           const sdk::i32* delta, const Rope& rope) const = 0;
  /// K and V of every slot below length[h], converted to the pages' dtype (round to nearest even).
  virtual void overwrite(const PageArrays& pages, const PageTable& table, const sdk::i32* length,
                         const NewContent& content) const = 0;
};

/// Throws Error when there is no backend for the device. The device must outlive the result.
std::unique_ptr<Moves> make_moves(const Device& device);
/// The backend of a CUDA device; make_moves calls it.
std::unique_ptr<Moves> make_cuda_moves(const Device& device);

}  // namespace lacuna
