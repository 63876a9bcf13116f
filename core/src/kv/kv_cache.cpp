#include "lacuna/kv/kv_cache.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "lacuna/base/error.hpp"
#include "page_pool.hpp"
#include "sides.hpp"

namespace lacuna {

using sdk::Dirty, sdk::Dtype, sdk::i32, sdk::i64;

namespace {

std::size_t at(i64 i) { return static_cast<std::size_t>(i); }

void check_slots(const std::vector<i32>& slots, i64 head, i32 length) {
  i32 previous = -1;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] <= previous || slots[i] >= length) {
      throw Error({"bad list of slots to keep", fmt::format("ascending, unique slots in [0, {})", length),
                   fmt::format("{} after {}", slots[i], i ? fmt::format("{}", previous) : "nothing"),
                   fmt::format("KV head {}, entry {}", head, i), ""});
    }
    previous = slots[i];
  }
}

}  // namespace

/// One writer's view of a sequence. Host mirrors of the table, the lengths and the positions decide; the device's
/// copies follow them, so that nothing is ever read back.
struct KvCache::Impl {
  Impl(std::shared_ptr<PagePool> pool_in, i32 heads_in, i64 max_tokens_in);
  ~Impl();

  /// Pages taken for a change that may still fail; those not used go back.
  class Lease {
   public:
    Lease(PagePool::Impl& pages, i64 n, const char* action);
    ~Lease() {
      for (; next_ < ids_.size(); ++next_) pages_.release(ids_[next_]);
    }
    Lease(const Lease&) = delete;
    i32 take() noexcept { return ids_[next_++]; }

   private:
    PagePool::Impl& pages_;
    std::vector<i32> ids_;
    std::size_t next_ = 0;
  };

  i32& entry(i64 head, i64 logical) { return table[at(head * max_pages + logical)]; }
  i64 pages_of(i64 head) const { return pages.pages_of(length[at(head)]); }
  PageTable device_page_table() const { return {device_table.data(), heads, max_pages}; }

  /// Gives the head a page of its own with the same content.
  void unshare(i64 head, i64 logical, Lease& lease) {
    i32& page = entry(head, logical);
    const i32 fresh = lease.take();
    pages.copy_page(fresh, page);
    pages.release(std::exchange(page, fresh));
  }
  void upload_table(i64 head, i64 begin, i64 end) {
    if (begin >= end) return;
    pages.device->copy_in(device_table.data() + head * max_pages + begin, &entry(head, begin),
                          at(end - begin) * sizeof(i32));
  }
  void upload_lengths() { upload(device_length.data(), length); }
  /// Room for n elements that is kept for the next call: an eviction a step would otherwise allocate at each.
  template <class T>
  T* scratch(Buffer<T>& buffer, i64 n) {
    if (buffer.size() < n) buffer = Buffer<T>(pages.device, std::max(n, 2 * buffer.size()));
    return buffer.data();
  }
  template <class T>
  void upload(T* to, const std::vector<T>& from) {
    pages.device->copy_in(to, from.data(), from.size() * sizeof(T));
  }

  const std::shared_ptr<PagePool> pool;
  PagePool::Impl& pages;
  const i32 heads;
  const i64 max_tokens;
  const i32 max_pages;
  std::vector<i32> table;                      // [heads, max_pages], null_page() past the pages in use
  std::vector<i32> length;                     // [heads]
  std::vector<std::vector<i32>> position;      // [heads][length]
  std::vector<std::vector<i32>> key_position;  // [heads][length] what each key is rotated for; empty: its own position
  std::vector<std::vector<i32>> dropped_channels;  // [heads][length] key channels that are not held; empty: none
  Buffer<i32> device_table, device_length;
  Buffer<i32> old_table, slot_scratch, head_scratch;
  Buffer<i64> indptr_scratch;
  Sides sides;
};

KvCache::Impl::Impl(std::shared_ptr<PagePool> pool_in, i32 heads_in, i64 max_tokens_in)
    : pool(std::move(pool_in)),
      pages(*pool->impl_),
      heads(heads_in),
      max_tokens(max_tokens_in),
      max_pages(static_cast<i32>(pages.pages_of(max_tokens))),
      table(at(static_cast<i64>(heads) * max_pages), pages.null_page()),
      length(at(heads), 0),
      position(at(heads)),
      device_table(pages.device, static_cast<i64>(table.size())),
      device_length(pages.device, heads),
      sides(pages.device, heads, max_tokens, pages.poison) {
  upload(device_table.data(), table);
  upload_lengths();
}

KvCache::Impl::~Impl() {
  for (i64 h = 0; h < heads; ++h) {
    for (i64 p = 0; p < pages_of(h); ++p) pages.release(entry(h, p));
  }
}

KvCache::Impl::Lease::Lease(PagePool::Impl& pages, i64 n, const char* action) : pages_(pages) {
  if (n > pages.available()) {
    throw Error({"the page pool is full", fmt::format("{} free pages to {}", n, action),
                 fmt::format("{} of {}", pages.available(), pages.max_pages), "",
                 "Give the pool more pages, or release or evict sequences first."});
  }
  ids_.reserve(at(n));
  for (i64 i = 0; i < n; ++i) ids_.push_back(pages.acquire());
}

KvCache::KvCache(std::shared_ptr<PagePool> pool, i32 num_kv_heads, i64 max_tokens) {
  if (num_kv_heads < 1) throw Error({"bad KV cache", "at least 1 KV head", fmt::format("{}", num_kv_heads), "", ""});
  if (max_tokens < 1 || max_tokens > std::numeric_limits<i32>::max()) {
    throw Error({"bad KV cache", "max_tokens from 1 to 2147483647", fmt::format("{}", max_tokens), "", ""});
  }
  impl_ = std::make_unique<Impl>(std::move(pool), num_kv_heads, max_tokens);
}
KvCache::KvCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;
KvCache::~KvCache() = default;

void KvCache::append(const void* k, const void* v, Dtype dtype, i64 head_stride, i64 n, i64 first_position) {
  Impl& c = *impl_;
  PagePool::Impl& pages = c.pages;
  if (dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) {
    throw Error({"bad element type of appended keys and values", "f32, f16 or bf16", "an integer type", "append", ""});
  }
  if (n < 0 || head_stride < n * pages.head_dim) {
    throw Error({"bad append",
                 fmt::format("n >= 0 tokens and a head stride of n * {} elements or more", pages.head_dim),
                 fmt::format("n = {}, stride {}", n, head_stride), "append", ""});
  }
  if (n == 0) return;
  const i64 last_position = first_position + n - 1;
  i32 newest = -1;
  for (const std::vector<i32>& positions : c.position) {
    if (!positions.empty()) newest = std::max(newest, positions.back());
  }
  if (first_position <= newest || last_position > std::numeric_limits<i32>::max()) {
    throw Error({"bad position of appended tokens", fmt::format("from {} to 2147483647", newest + i64{1}),
                 fmt::format("{} to {}", first_position, last_position), "append", ""});
  }
  i64 needed = 0;
  const auto last_is_shared = [&](i64 h) {
    const i64 tokens = c.length[at(h)];
    return tokens % pages.page_size != 0 && pages.shared(c.entry(h, tokens / pages.page_size));
  };
  for (i64 h = 0; h < c.heads; ++h) {
    const i64 tokens = c.length[at(h)];
    if (tokens + n > c.max_tokens) {
      throw Error({"the page table is full", fmt::format("at most {} tokens", c.max_tokens),
                   fmt::format("{} cached and {} new ones", tokens, n), fmt::format("KV head {}", h),
                   "Make the cache with a larger max_tokens, or evict first."});
    }
    needed += pages.pages_of(tokens + n) - pages.pages_of(tokens) + last_is_shared(h);
  }
  Impl::Lease lease(pages, needed, "append");
  c.sides.own_for_append(c.length, n);
  for (auto* mirror : {&c.position, &c.key_position, &c.dropped_channels}) {
    for (std::vector<i32>& of_slot : *mirror) {
      const std::size_t size = of_slot.size() + at(n);
      if (size > of_slot.capacity()) of_slot.reserve(std::max(size, 2 * of_slot.capacity()));
    }
  }

  for (i64 h = 0; h < c.heads; ++h) {
    const i64 tokens = c.length[at(h)], end = pages.pages_of(tokens + n);
    i64 first_changed = pages.pages_of(tokens);
    if (last_is_shared(h)) c.unshare(h, --first_changed, lease);
    for (i64 p = pages.pages_of(tokens); p < end; ++p) c.entry(h, p) = lease.take();
    c.upload_table(h, first_changed, end);
  }
  pages.moves->append(pages.arrays(), c.device_page_table(), c.device_length.data(),
                      {k, v, dtype, head_stride, n, first_position});
  c.sides.appended(c.length, n);
  for (i32& tokens : c.length) tokens += static_cast<i32>(n);
  c.upload_lengths();
  for (auto* mirror : {&c.position, &c.key_position}) {
    for (std::vector<i32>& positions : *mirror) {
      for (i64 i = 0; i < n; ++i) positions.push_back(static_cast<i32>(first_position + i));
    }
  }
  for (std::vector<i32>& of_slot : c.dropped_channels) of_slot.resize(of_slot.size() + at(n), 0);
}

KvCache KvCache::fork() const {
  const Impl& from = *impl_;
  auto copy = std::make_unique<Impl>(from.pool, from.heads, from.max_tokens);
  copy->position = from.position;
  copy->key_position = from.key_position;
  copy->dropped_channels = from.dropped_channels;
  copy->sides = from.sides.fork();
  copy->pages.device->copy(copy->device_table.data(), from.device_table.data(), from.table.size() * sizeof(i32));
  copy->pages.device->copy(copy->device_length.data(), from.device_length.data(), from.length.size() * sizeof(i32));
  // Last, and without a chance to fail: from here the copy's destructor gives the pages back.
  std::copy(from.table.begin(), from.table.end(), copy->table.begin());
  std::copy(from.length.begin(), from.length.end(), copy->length.begin());
  for (i64 h = 0; h < copy->heads; ++h) {
    for (i64 p = 0; p < copy->pages_of(h); ++p) copy->pages.share(copy->entry(h, p));
  }
  return KvCache(std::move(copy));
}

void KvCache::retain(const std::vector<std::vector<i32>>& slots) {
  Impl& c = *impl_;
  PagePool::Impl& pages = c.pages;
  if (slots.size() != at(c.heads)) {
    throw Error({"bad lists of slots to keep", fmt::format("one for each of {} KV heads", c.heads),
                 fmt::format("{} lists", slots.size()), "", ""});
  }
  std::vector<HeadChange> changes;
  std::vector<i64> indptr{0};
  std::vector<i32> from, first_moved;
  i64 needed = 0;
  for (i64 h = 0; h < c.heads; ++h) {
    const std::vector<i32>& kept = slots[at(h)];
    const i32 before = c.length[at(h)], after = static_cast<i32>(kept.size());
    check_slots(kept, h, before);
    i32 same = 0;
    while (same < after && kept[at(same)] == same) ++same;
    changes.push_back({&kept, same, before, after});
    from.insert(from.end(), kept.begin(), kept.end());
    indptr.push_back(static_cast<i64>(from.size()));
    first_moved.push_back(same);
    if (after == before) continue;
    for (i64 p = same / pages.page_size; p < pages.pages_of(after); ++p) needed += pages.shared(c.entry(h, p));
  }
  Impl::Lease lease(pages, needed, "move tokens out of shared ones");
  c.sides.own_for_retain(changes);
  i64* device_indptr = c.scratch(c.indptr_scratch, static_cast<i64>(indptr.size()));
  i32* device_from = c.scratch(c.slot_scratch, static_cast<i64>(from.size()));
  i32* device_first = c.scratch(c.head_scratch, c.heads);
  i32* old_table = c.scratch(c.old_table, static_cast<i64>(c.table.size()));
  std::vector<i32> released;
  released.reserve(at(this->pages()));
  c.upload(device_indptr, indptr);
  c.upload(device_from, from);
  c.upload(device_first, first_moved);

  // A copy of the old table is the source; replaced pages live until their tokens have moved.
  pages.device->copy(old_table, c.device_table.data(), c.table.size() * sizeof(i32));
  for (i64 h = 0; h < c.heads; ++h) {
    const HeadChange& change = changes[at(h)];
    if (change.after == change.before) continue;
    const i64 first = change.same / pages.page_size, end = pages.pages_of(change.after);
    i64 first_changed = end;
    for (i64 p = first; p < end; ++p) {
      i32& page = c.entry(h, p);
      if (!pages.shared(page)) continue;
      first_changed = std::min(first_changed, p);
      const i32 fresh = lease.take();
      if (p == first && change.same % pages.page_size != 0) pages.copy_page(fresh, page);
      released.push_back(std::exchange(page, fresh));
    }
    for (i64 p = end; p < pages.pages_of(change.before); ++p) {
      released.push_back(std::exchange(c.entry(h, p), pages.null_page()));
    }
    c.upload_table(h, first_changed, pages.pages_of(change.before));
  }
  const Gather gather{c.heads, device_indptr, device_from, device_first};
  pages.moves->gather_pages(pages.arrays(), {old_table, c.heads, c.max_pages}, c.device_page_table(), gather);
  c.sides.retained(changes, gather, *pages.moves);
  for (const i32 page : released) pages.release(page);
  for (i64 h = 0; h < c.heads; ++h) {
    const HeadChange& change = changes[at(h)];
    c.length[at(h)] = static_cast<i32>(change.after);
    const i64 tail = change.after % pages.page_size;
    if (change.after < change.before && tail != 0) {
      pages.poison_slots(c.entry(h, change.after / pages.page_size), static_cast<i32>(tail));
    }
    for (auto* mirror : {&c.position, &c.key_position, &c.dropped_channels}) {
      if (mirror->empty()) continue;
      std::vector<i32>& of_slot = (*mirror)[at(h)];
      for (i64 i = change.same; i < change.after; ++i) of_slot[at(i)] = of_slot[at(slots[at(h)][at(i)])];
      of_slot.resize(at(change.after));
    }
  }
  c.upload_lengths();
}

void KvCache::compact_positions(const Rope& rope) {
  Impl& c = *impl_;
  PagePool::Impl& pages = c.pages;
  if (2 * rope.frequencies().size() != at(pages.head_dim)) {
    throw Error({"the rotary embedding does not fit the cache", fmt::format("{} channels", pages.head_dim),
                 fmt::format("{}", 2 * rope.frequencies().size()), "compact_positions", ""});
  }
  std::vector<std::vector<i32>> at_slot(at(c.heads));
  std::vector<i64> indptr{0}, first_turned;
  std::vector<i32> delta;
  std::vector<std::pair<i64, i64>> shared;  // (head, logical page) to be written but not ours alone
  for (i64 h = 0; h < c.heads; ++h) {
    const std::vector<i32>& carried = (c.key_position.empty() ? c.position : c.key_position)[at(h)];
    at_slot[at(h)].resize(carried.size());
    std::iota(at_slot[at(h)].begin(), at_slot[at(h)].end(), 0);
    const std::size_t begin = delta.size();
    for (std::size_t i = 0; i < carried.size(); ++i) delta.push_back(static_cast<i32>(i) - carried[i]);
    indptr.push_back(static_cast<i64>(delta.size()));
    const auto turned = [](i32 d) { return d != 0; };
    first_turned.push_back(std::find_if(delta.begin() + begin, delta.end(), turned) - delta.begin() - begin);
    for (i64 p = 0; p < c.pages_of(h); ++p) {
      const auto a = delta.begin() + begin + p * pages.page_size;
      const auto b = std::min(a + pages.page_size, delta.end());
      if (pages.shared(c.entry(h, p)) && std::any_of(a, b, turned)) shared.emplace_back(h, p);
    }
  }
  Impl::Lease lease(pages, static_cast<i64>(shared.size()), "rotate keys of shared ones");
  i64* device_indptr = c.scratch(c.indptr_scratch, static_cast<i64>(indptr.size()));
  i32* device_delta = c.scratch(c.slot_scratch, static_cast<i64>(delta.size()));
  c.upload(device_indptr, indptr);
  c.upload(device_delta, delta);

  for (const auto& [h, p] : shared) {
    c.unshare(h, p, lease);
    c.upload_table(h, p, p + 1);
  }
  pages.moves->rotate_keys(pages.arrays(), c.device_page_table(), device_indptr, device_delta, rope);
  for (i32 h = 0; h < c.heads; ++h) {
    if (first_turned[at(h)] < c.length[at(h)]) c.sides.rewritten(h, first_turned[at(h)]);
  }
  c.key_position = std::move(at_slot);
}

void KvCache::overwrite(const float* k, const float* v, const i32* from, i64 slots) {
  Impl& c = *impl_;
  PagePool::Impl& pages = c.pages;
  if (const i64 longest = *std::max_element(c.length.begin(), c.length.end()); slots < longest) {
    throw Error({"too little new content for the cached tokens", fmt::format("{} rows a head", longest),
                 fmt::format("{}", slots), "overwrite", ""});
  }
  std::vector<std::pair<i64, i64>> shared;  // (head, logical page)
  for (i64 h = 0; h < c.heads; ++h) {
    for (i64 p = 0; p < c.pages_of(h); ++p) {
      if (pages.shared(c.entry(h, p))) shared.emplace_back(h, p);
    }
  }
  Impl::Lease lease(pages, static_cast<i64>(shared.size()), "rewrite tokens of shared ones");
  for (const auto& [h, p] : shared) c.unshare(h, p, lease);
  for (i64 h = 0; h < c.heads; ++h) c.upload_table(h, 0, c.pages_of(h));
  pages.moves->overwrite(pages.arrays(), c.device_page_table(), c.device_length.data(), {k, v, from, slots});
  for (i32 h = 0; h < c.heads; ++h) {
    if (c.length[at(h)] > 0) c.sides.rewritten(h, 0);
  }
}

void KvCache::drop_key_channels(const std::vector<i32>& until, const std::vector<i32>& channels) {
  Impl& c = *impl_;
  if (until.size() != at(c.heads) || channels.size() != at(c.heads)) {
    throw Error({"bad numbers of dropped channels", fmt::format("one for each of {} KV heads", c.heads),
                 fmt::format("{} and {}", until.size(), channels.size()), "drop_key_channels", ""});
  }
  c.dropped_channels.resize(at(c.heads));
  for (i64 h = 0; h < c.heads; ++h) {
    std::vector<i32>& dropped = c.dropped_channels[at(h)];
    dropped.resize(at(c.length[at(h)]), 0);
    for (i64 i = 0; i < std::min<i64>(until[at(h)], c.length[at(h)]); ++i)
      dropped[at(i)] = std::max(dropped[at(i)], channels[at(h)]);
  }
}

void KvCache::add_side(const sdk::Side& side) { impl_->sides.add(side, impl_->length); }
sdk::Array KvCache::side(const std::string& name) { return impl_->sides.array(name); }
Dirty KvCache::take_dirty(i32 unit_tokens) { return impl_->sides.take_dirty(unit_tokens, impl_->length); }

sdk::Paged KvCache::view() const {
  const Impl& c = *impl_;
  const PagePool::Impl& pages = c.pages;
  return {c.device_table.data(),
          c.device_length.data(),
          pages.position.data(),
          pages.k.data(),
          pages.v.data(),
          pages.dtype,
          c.heads,
          c.max_pages,
          pages.page_size,
          pages.head_dim,
          *std::max_element(c.length.begin(), c.length.end())};
}

i64 KvCache::length(i32 head) const { return impl_->length.at(at(head)); }

std::vector<i32> KvCache::positions(i32 head) const { return impl_->position.at(at(head)); }

i64 KvCache::pages() const {
  i64 total = 0;
  for (i64 h = 0; h < impl_->heads; ++h) total += impl_->pages_of(h);
  return total;
}
i64 KvCache::dropped_bytes() const {
  i64 channels = 0;
  for (const std::vector<i32>& dropped : impl_->dropped_channels)
    channels = std::accumulate(dropped.begin(), dropped.end(), channels);
  return channels * sdk::size_of(impl_->pages.dtype);
}
i64 KvCache::kv_bytes() const { return pages() * impl_->pool->kv_bytes_per_page() - dropped_bytes(); }
i64 KvCache::token_bytes() const {
  const i64 tokens = std::accumulate(impl_->length.begin(), impl_->length.end(), i64{0});
  return 2 * tokens * impl_->pages.head_dim * sdk::size_of(impl_->pages.dtype) - dropped_bytes();
}
i64 KvCache::side_bytes() const { return impl_->sides.bytes(impl_->length); }

}  // namespace lacuna
