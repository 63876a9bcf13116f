#include "sides.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "lacuna/base/error.hpp"

namespace lacuna {

using sdk::Dirty, sdk::Dtype, sdk::i32, sdk::i64, sdk::SidePer;

namespace {

constexpr int kNanByte = 0xff;

bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::f16 || t == Dtype::bf16; }

}  // namespace

Sides::Sides(std::shared_ptr<Device> device, i32 heads, i64 max_tokens, bool poison)
    : device_(std::move(device)), heads_(heads), max_tokens_(max_tokens), poison_(poison) {}

Sides Sides::fork() const {
  Sides copy(device_, heads_, max_tokens_, poison_);
  copy.entries_ = entries_;
  for (const auto& [unit_tokens, tracker] : trackers_) copy.trackers_[unit_tokens].fresh_units = tracker.fresh_units;
  return copy;
}

void Sides::add(const sdk::Side& side, const std::vector<i32>& length) {
  Entry entry{side.name ? side.name : "",
              side.per,
              side.per == SidePer::token ? 1 : side.unit_tokens,
              side.dtype,
              side.elements,
              side.moves != 0 && side.per == SidePer::token,
              nullptr};
  const std::string where = fmt::format("side '{}'", entry.name);
  if (entry.name.empty()) throw Error({"a side without a name", "a name", "none", "", "Name it in plan()."});
  if (entry.elements < 1) {
    throw Error({"bad side", "at least 1 element a unit", fmt::format("{}", entry.elements), where, ""});
  }
  if (entry.unit_tokens < 1) {
    throw Error({"bad side", "units of at least 1 token", fmt::format("{}", entry.unit_tokens), where, ""});
  }
  for (const Entry& other : entries_) {
    if (other.name == entry.name) {
      throw Error({"a side is declared twice", "distinct names", entry.name, where, "Rename one of the two."});
    }
  }
  const i64 units = entry.units(max_tokens_);
  entry.data = std::make_shared<Buffer<std::byte>>(device_, heads_ * units * entry.unit_bytes());
  for (i32 h = 0; h < heads_; ++h) {
    const i64 used = entry.units(length[static_cast<std::size_t>(h)]);
    fill_units(entry, h, 0, used, 0);
    fill_units(entry, h, used, units, beyond_byte(entry));
  }
  trackers_.erase(entry.unit_tokens);  // nothing of the new side is up to date
  entries_.push_back(std::move(entry));
}

sdk::Array Sides::array(const std::string& name) {
  const auto it = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.name == name; });
  if (it == entries_.end()) {
    std::vector<std::string> known;
    for (const Entry& e : entries_) known.push_back(e.name);
    throw Error({"unknown side", "a side that was declared", fmt::format("'{}'", name), "", suggestion(name, known)});
  }
  own(*it);
  const i64 units = it->units(max_tokens_);
  return {it->data->data(), it->dtype, 3, {heads_, units, it->elements, 1}, {units * it->elements, it->elements, 1, 1}};
}

Dirty Sides::take_dirty(i32 unit_tokens, const std::vector<i32>& length) {
  if (unit_tokens < 1) {
    throw Error({"bad side granularity", "units of at least 1 token", fmt::format("{}", unit_tokens), "", ""});
  }
  const auto heads = static_cast<std::size_t>(heads_);
  Tracker& tracker = trackers_.try_emplace(unit_tokens, Tracker{std::vector<i32>(heads, 0), {}}).first->second;
  if (tracker.range.size() == 0) tracker.range = Buffer<i32>(device_, 2 * heads_);
  std::vector<i32> range(2 * heads);
  Dirty dirty{heads_, unit_tokens, tracker.range.data(), tracker.range.data() + heads_, 0};
  for (std::size_t h = 0; h < heads; ++h) {
    range[h] = tracker.fresh_units[h];
    range[heads + h] = static_cast<i32>((length[h] + static_cast<i64>(unit_tokens) - 1) / unit_tokens);
    dirty.max_units = std::max(dirty.max_units, range[heads + h] - range[h]);
  }
  device_->copy_in(tracker.range.data(), range.data(), range.size() * sizeof(i32));
  std::copy(range.begin() + heads_, range.end(), tracker.fresh_units.begin());
  return dirty;
}

i64 Sides::bytes(const std::vector<i32>& length) const {
  i64 total = 0;
  for (const Entry& e : entries_) {
    for (const i32 n : length) total += e.units(n) * e.unit_bytes();
  }
  return total;
}

void Sides::own_for_append(const std::vector<i32>& length, i64 n) {
  for (Entry& e : entries_) {
    const auto grows = [&](i32 tokens) { return e.units(tokens + n) > e.units(tokens); };
    if (std::any_of(length.begin(), length.end(), grows)) own(e);
  }
}

void Sides::appended(const std::vector<i32>& length_before, i64 n) {
  for (i32 h = 0; h < heads_; ++h) {
    const i32 before = length_before[static_cast<std::size_t>(h)];
    for (Entry& e : entries_) fill_units(e, h, e.units(before), e.units(before + n), 0);
    rewritten(h, before);
  }
}

void Sides::own_for_retain(const std::vector<HeadChange>& heads) {
  for (Entry& e : entries_) {
    const auto writes = [&](const HeadChange& c) {
      return e.units(c.after) < e.units(c.before) || (e.carried && c.same < c.after);
    };
    if (std::any_of(heads.begin(), heads.end(), writes)) own(e);
  }
}

void Sides::retained(const std::vector<HeadChange>& heads, const Gather& gather, const Moves& moves) {
  const bool any_moved = std::any_of(heads.begin(), heads.end(), [](const HeadChange& c) { return c.same < c.after; });
  for (Entry& e : entries_) {
    if (e.carried && any_moved) {
      moves.gather_side(e.data->data(), e.units(max_tokens_) * e.unit_bytes(), e.unit_bytes(), gather);
    }
    for (i32 h = 0; h < heads_; ++h) {
      const HeadChange& c = heads[static_cast<std::size_t>(h)];
      fill_units(e, h, e.units(c.after), e.units(c.before), beyond_byte(e));
    }
  }
  for (auto& [unit_tokens, tracker] : trackers_) {
    const bool moved_along = carried(unit_tokens);
    for (std::size_t h = 0; h < tracker.fresh_units.size(); ++h) {
      const HeadChange& c = heads[h];
      i32& fresh = tracker.fresh_units[h];
      if (c.before == c.after) continue;
      // Carried tokens stay up to date wherever they went; otherwise the unit of the first change is the first bad one.
      fresh = moved_along ? static_cast<i32>(std::lower_bound(c.from->begin(), c.from->end(), fresh) - c.from->begin())
                          : std::min(fresh, static_cast<i32>(c.same / unit_tokens));
    }
  }
}

void Sides::rewritten(i32 head, i64 first_slot) {
  for (auto& [unit_tokens, tracker] : trackers_) {
    i32& fresh = tracker.fresh_units[static_cast<std::size_t>(head)];
    fresh = std::min(fresh, static_cast<i32>(first_slot / unit_tokens));
  }
}

void Sides::own(Entry& entry) {
  if (entry.data.use_count() == 1) return;
  auto copy = std::make_shared<Buffer<std::byte>>(device_, entry.data->size());
  device_->copy(copy->data(), entry.data->data(), static_cast<std::size_t>(copy->size()));
  entry.data = std::move(copy);
}

void Sides::fill_units(Entry& entry, i32 head, i64 begin, i64 end, int byte) {
  if (begin >= end) return;
  const i64 bytes = entry.unit_bytes();
  device_->fill(entry.data->data() + (head * entry.units(max_tokens_) + begin) * bytes, byte,
                static_cast<std::size_t>((end - begin) * bytes));
}

int Sides::beyond_byte(const Entry& entry) const { return poison_ && is_float(entry.dtype) ? kNanByte : 0; }

bool Sides::carried(i32 unit_tokens) const {
  bool any = false;
  for (const Entry& e : entries_) {
    if (e.unit_tokens != unit_tokens) continue;
    if (!e.carried) return false;
    any = true;
  }
  return any;
}

}  // namespace lacuna
