// Side data beside the pages, and which units of it are out of date.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"
#include "moves.hpp"

namespace lacuna {

/// What retain did to one head: its first `same` slots stayed where they were, slot i >= same came from slot from[i].
struct HeadChange {
  const std::vector<sdk::i32>* from;
  sdk::i64 same, before, after;  // tokens
};

/// Arrays [heads, units for max_tokens, elements], shared by forks until one writes. Units in use start as zeros; units
/// beyond hold zeros, or NaN for float sides with poison.
///
/// Out of date is always a tail: appending changes the last unit and retain everything from the first change on. So one
/// number a head and granularity, the units from the front that are up to date, says it all.
class Sides {
 public:
  Sides(std::shared_ptr<Device> device, sdk::i32 heads, sdk::i64 max_tokens, bool poison);
  Sides fork() const;

  void add(const sdk::Side& side, const std::vector<sdk::i32>& length);
  sdk::Array array(const std::string& name);
  sdk::Dirty take_dirty(sdk::i32 unit_tokens, const std::vector<sdk::i32>& length);
  sdk::i64 bytes(const std::vector<sdk::i32>& length) const;

  // A change comes in two halves, so that a failure leaves everything as it was: own() copies the arrays that the
  // change will write and that a fork shares; the other half, after it, allocates nothing.
  void own_for_append(const std::vector<sdk::i32>& length, sdk::i64 n);
  void appended(const std::vector<sdk::i32>& length_before, sdk::i64 n);
  void own_for_retain(const std::vector<HeadChange>& heads);
  void retained(const std::vector<HeadChange>& heads, const Gather& gather, const Moves& moves);
  /// The keys of one head changed in place from first_slot on.
  void rewritten(sdk::i32 head, sdk::i64 first_slot);

 private:
  struct Entry {
    std::string name;
    sdk::SidePer per;
    sdk::i32 unit_tokens;  // 1 for token sides
    sdk::Dtype dtype;
    sdk::i64 elements;
    bool carried;  // retain moves it along
    std::shared_ptr<Buffer<std::byte>> data;

    sdk::i64 units(sdk::i64 tokens) const { return (tokens + unit_tokens - 1) / unit_tokens; }
    sdk::i64 unit_bytes() const { return elements * sdk::size_of(dtype); }
  };
  struct Tracker {
    std::vector<sdk::i32> fresh_units;  // [heads] units from the front that are up to date
    Buffer<sdk::i32> range;             // [2, heads] what take_dirty() returned last
  };

  void own(Entry& entry);
  void fill_units(Entry& entry, sdk::i32 head, sdk::i64 begin, sdk::i64 end, int byte);
  int beyond_byte(const Entry& entry) const;
  /// Whether every side of this granularity moves along on retain.
  bool carried(sdk::i32 unit_tokens) const;

  std::shared_ptr<Device> device_;
  sdk::i32 heads_;
  sdk::i64 max_tokens_;
  bool poison_;
  std::vector<Entry> entries_;
  std::map<sdk::i32, Tracker> trackers_;  // by unit_tokens
};

}  // namespace lacuna
