#include <algorithm>

#include "support.hpp"

namespace kv_test {
namespace {

constexpr i32 kHeadDim = 8;

std::shared_ptr<PagePool> make_pool(i64 pages, i32 page_size = 16, Dtype dtype = Dtype::f32, bool poison = true) {
  return std::make_shared<PagePool>(test_device(), page_size, kHeadDim, dtype, pages, poison);
}

struct Filled {
  KvCache cache;
  Model model;
};
Filled filled(const std::shared_ptr<PagePool>& pool, i32 heads, i64 n, i64 max_tokens = 4096,
              Dtype dtype = Dtype::f32) {
  Filled out{KvCache(pool, heads, max_tokens), Model(static_cast<std::size_t>(heads))};
  const Batch batch(heads, kHeadDim, n, 0, 7);
  batch.append_to(out.cache, kHeadDim);
  batch.append_to(out.model, kHeadDim, dtype);
  return out;
}

}  // namespace

TEST_CASE("append converts every pair of element types as the sdk rounds") {
  const Dtype types[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
  for (const Dtype from : types) {
    for (const Dtype to : types) {
      const i64 n = 70, stride = (n + 3) * kHeadDim;  // heads farther apart than their tokens
      std::vector<float> x(static_cast<std::size_t>(2 * stride));
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = rounded(std::sin(static_cast<float>(i)) * 3, from);
      std::vector<u16> half(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) half[i] = from == Dtype::bf16 ? sdk::to_bf16(x[i]) : sdk::to_f16(x[i]);
      const Buffer<float> x_on_device = upload(x);
      const Buffer<u16> half_on_device = upload(half);
      const void* data = from == Dtype::f32 ? static_cast<const void*>(x_on_device.data()) : half_on_device.data();
      KvCache cache(make_pool(20, 16, to), 2, 100);
      cache.append(data, data, from, stride, n, 0);
      const HostView host(cache);
      const sdk::Paged& kv = host.kv;
      i64 wrong = 0;
      for (i64 h = 0; h < 2; ++h) {
        for (i64 i = 0; i < n * kHeadDim; ++i) {
          const float expected = rounded(x[static_cast<std::size_t>(h * stride + i)], to);
          wrong +=
              kv.key(h, i / kHeadDim, i % kHeadDim) != expected || kv.value(h, i / kHeadDim, i % kHeadDim) != expected;
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("bytes are counted exactly") {
  const auto pool = make_pool(64, 16, Dtype::bf16);
  CHECK(pool->kv_bytes_per_page() == 2 * 16 * kHeadDim * 2);
  CHECK(pool->bytes_per_page() == pool->kv_bytes_per_page() + 16 * 4);
  CHECK(pool->capacity() == 64);
  const Filled f = filled(pool, 2, 20);
  CHECK(f.cache.pages() == 4);
  CHECK(f.cache.kv_bytes() == 4 * pool->kv_bytes_per_page());
  CHECK(f.cache.token_bytes() == 2 * 20 * 2 * kHeadDim * 2);
}

TEST_CASE("evicting 90 % scattered tokens returns at least 85 % of the pages, ragged heads included") {
  const auto pool = make_pool(2 * 128, 16, Dtype::bf16);
  Filled f = filled(pool, 2, 2048, 2048, Dtype::bf16);
  REQUIRE(f.cache.pages() == 256);
  std::vector<std::vector<i32>> slots(2);
  for (i32 i = 0; i < 2048; ++i) {
    if (i % 16 == 3) slots[0].push_back(i);  // 128 tokens
    if (i % 7 == 1) slots[1].push_back(i);   // 293 tokens
  }
  slots[1].resize(282);
  f.cache.retain(slots);
  retain(f.model, slots);
  CHECK(f.cache.pages() == 8 + 18);
  CHECK(f.cache.pages() <= 0.15 * 256);
  CHECK(pool->pages_in_use() == f.cache.pages());
  CHECK(differences(f.cache, f.model, true) == 0);
}

TEST_CASE("a fork shares pages until one side writes, and outlives its parent") {
  const auto pool = make_pool(64);
  Filled parent = filled(pool, 2, 40);  // 3 pages a head, the last one partial
  REQUIRE(pool->pages_in_use() == 6);
  Filled child{parent.cache.fork(), parent.model};
  CHECK(pool->pages_in_use() == 6);
  CHECK(physical_pages(child.cache, 1) == physical_pages(parent.cache, 1));

  const Batch more(2, kHeadDim, 1, 40, 9);
  more.append_to(child.cache, kHeadDim);
  more.append_to(child.model, kHeadDim, Dtype::f32);
  CHECK(pool->pages_in_use() == 8);  // only the two partial pages were copied
  CHECK(physical_pages(child.cache, 0)[1] == physical_pages(parent.cache, 0)[1]);
  CHECK(physical_pages(child.cache, 0)[2] != physical_pages(parent.cache, 0)[2]);
  more.append_to(parent.cache, kHeadDim);
  CHECK(pool->pages_in_use() == 8);  // the parent now owns its last pages alone
  more.append_to(parent.model, kHeadDim, Dtype::f32);
  CHECK(differences(parent.cache, parent.model, true) == 0);

  parent.cache = KvCache(pool, 1, 16);
  CHECK(pool->pages_in_use() == 6);
  CHECK(differences(child.cache, child.model, true) == 0);
}

TEST_CASE("new content goes to pages of the sequence's own, rounded as the sdk rounds, and makes sides dirty") {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const auto pool = make_pool(64, 16, dtype);
    Filled parent = filled(pool, 2, 40, 4096, dtype);
    Filled child{parent.cache.fork(), parent.model};
    child.cache.add_side({"sums", sdk::SidePer::token, 0, Dtype::f32, 1, 1});
    child.cache.take_dirty(1);
    const std::vector<std::vector<i32>> kept = {{0, 3, 17, 39}, iota(0, 40)};
    child.cache.retain(kept);
    retain(child.model, kept);

    constexpr i64 kSlots = 40;
    std::vector<float> k(2 * kSlots * kHeadDim), v(k.size());
    for (std::size_t i = 0; i < k.size(); ++i) {
      k[i] = std::sin(static_cast<float>(i));
      v[i] = std::cos(static_cast<float>(i));
    }
    std::vector<i32> from(2 * kSlots, 0);
    for (std::size_t h = 0; h < 2; ++h) {
      std::copy(kept[h].begin(), kept[h].end(), from.begin() + static_cast<std::ptrdiff_t>(h * kSlots));
      for (std::size_t i = 0; i < kept[h].size(); ++i) {
        const std::size_t at = (h * kSlots + static_cast<std::size_t>(kept[h][i])) * kHeadDim;
        for (std::size_t c = 0; c < kHeadDim; ++c) {
          child.model[h][i].k[c] = rounded(k[at + c], dtype);
          child.model[h][i].v[c] = rounded(v[at + c], dtype);
        }
      }
    }
    const Buffer<float> new_k = upload(k), new_v = upload(v);
    const Buffer<i32> rows = upload(from);
    child.cache.overwrite(new_k.data(), new_v.data(), rows.data(), kSlots);
    CHECK(differences(child.cache, child.model, true) == 0);
    CHECK(differences(parent.cache, parent.model, true) == 0);
    CHECK(child.cache.take_dirty(1).max_units == 40);
    CHECK_THROWS_AS(child.cache.overwrite(new_k.data(), new_v.data(), rows.data(), 39), Error);
  }
}

TEST_CASE("new content needs pages for shared ones, and nothing changes where there are none") {
  const auto pool = make_pool(4);
  Filled parent = filled(pool, 1, 40);
  Filled child{parent.cache.fork(), parent.model};
  const Buffer<float> content = upload(std::vector<float>(40 * kHeadDim, 1.f));
  const Buffer<i32> rows = upload(iota(0, 40));
  CHECK_THROWS_WITH_AS(child.cache.overwrite(content.data(), content.data(), rows.data(), 40),
                       doctest::Contains("pool is full"), Error);
  CHECK(differences(child.cache, child.model, true) == 0);
  CHECK(pool->pages_in_use() == 3);
}

TEST_CASE("dropped key channels are not counted, wherever their tokens go") {
  const auto pool = make_pool(64, 16, Dtype::bf16);
  Filled f = filled(pool, 2, 40, 4096, Dtype::bf16);
  const i64 pages = f.cache.kv_bytes(), tokens = f.cache.token_bytes();
  f.cache.drop_key_channels({30, 0}, {3, 5});
  CHECK(f.cache.token_bytes() == tokens - 30 * 3 * 2);
  CHECK(f.cache.kv_bytes() == pages - 30 * 3 * 2);
  f.cache.drop_key_channels({10, 0}, {2, 0});  // fewer than are dropped already
  CHECK(f.cache.token_bytes() == tokens - 30 * 3 * 2);

  const Batch more(2, kHeadDim, 1, 40, 9);
  more.append_to(f.cache, kHeadDim);
  const KvCache fork = f.cache.fork();
  f.cache.retain({{0, 5, 29, 30, 40}, iota(0, 41)});
  CHECK(f.cache.token_bytes() == 2 * (5 + 41) * kHeadDim * 2 - 3 * 3 * 2);
  CHECK(fork.token_bytes() == tokens + 2 * 2 * kHeadDim * 2 - 30 * 3 * 2);
}

TEST_CASE("retain keeps the pages before the first dropped slot, shared or not") {
  const auto pool = make_pool(64);
  Filled parent = filled(pool, 1, 64);
  std::vector<i32> kept = iota(0, 64);
  kept.erase(kept.begin() + 20);
  Filled child{parent.cache.fork(), parent.model};
  child.cache.retain({kept});
  retain(child.model, {kept});
  CHECK(physical_pages(child.cache, 0)[0] == physical_pages(parent.cache, 0)[0]);
  CHECK(pool->pages_in_use() == 4 + 3);
  CHECK(differences(child.cache, child.model, true) == 0);
  CHECK(differences(parent.cache, parent.model, true) == 0);

  const std::vector<i32> before = physical_pages(child.cache, 0);
  child.cache.retain({iota(0, 63)});  // everything: nothing moves
  CHECK(physical_pages(child.cache, 0) == before);

  // A sequence that is alone compacts inside its own pages.
  parent.cache = KvCache(pool, 1, 16);
  Filled last = filled(pool, 1, 64);
  const std::vector<i32> own = physical_pages(last.cache, 0);
  last.cache.retain({kept});
  CHECK(physical_pages(last.cache, 0) == own);
}

TEST_CASE("a free page of the lowest id is taken first") {
  const auto pool = make_pool(64);
  Filled a = filled(pool, 1, 32), b = filled(pool, 1, 32);
  CHECK(physical_pages(a.cache, 0) == std::vector<i32>{0, 1});
  CHECK(physical_pages(b.cache, 0) == std::vector<i32>{2, 3});
  a.cache = KvCache(pool, 1, 16);
  CHECK(physical_pages(filled(pool, 1, 48).cache, 0) == std::vector<i32>{0, 1, 4});
}

TEST_CASE("a full pool or table throws and leaves everything as it was") {
  const auto pool = make_pool(6);
  Filled f = filled(pool, 2, 40, 60);  // takes all six pages
  Filled child{f.cache.fork(), f.model};
  const auto intact = [&] {
    CHECK(differences(f.cache, f.model, true) == 0);
    CHECK(differences(child.cache, child.model, true) == 0);
    CHECK(pool->pages_in_use() == 6);
    CHECK(physical_pages(child.cache, 1) == physical_pages(f.cache, 1));
  };
  const Batch more(2, kHeadDim, 1, 40, 9), many(2, kHeadDim, 21, 40, 9);
  CHECK_THROWS_WITH_AS(more.append_to(child.cache, kHeadDim), doctest::Contains("pool is full"), Error);
  intact();
  CHECK_THROWS_WITH_AS(many.append_to(f.cache, kHeadDim), doctest::Contains("table is full"), Error);
  intact();
  CHECK_THROWS_WITH_AS(child.cache.retain({iota(1, 40), iota(0, 40)}), doctest::Contains("pool is full"), Error);
  intact();
  child.cache.retain({iota(0, 16), iota(0, 32)});  // whole pages: needs none
  retain(child.model, {iota(0, 16), iota(0, 32)});
  CHECK(differences(child.cache, child.model, true) == 0);

  KvCache short_one(make_pool(6), 1, 20);  // 20 tokens are 2 pages, but 20 is the limit
  CHECK_THROWS_AS(Batch(1, kHeadDim, 21, 0, 1).append_to(short_one, kHeadDim), Error);
  Batch(1, kHeadDim, 20, 0, 1).append_to(short_one, kHeadDim);
}

TEST_CASE("an allocation that fails leaves cache, fork and pool as they were") {
  const auto device = std::make_shared<FailingDevice>();
  const auto pool = std::make_shared<PagePool>(device, 16, kHeadDim, Dtype::f32, 64, true);
  Filled f = filled(pool, 2, 40);
  f.cache.add_side({"sum", sdk::SidePer::token, 0, Dtype::f32, 1, 1});
  Filled child{f.cache.fork(), f.model};
  const auto attempt = [&](auto change) {
    int failures = 0;
    for (int allowed = 0;; ++allowed, ++failures) {
      device->left = allowed;
      try {
        change();
        break;
      } catch (const Error&) {
        device->left = -1;
        REQUIRE(differences(child.cache, child.model, true) == 0);
        REQUIRE(differences(f.cache, f.model, true) == 0);
        REQUIRE(pool->pages_in_use() == 6);
      }
    }
    device->left = -1;
    CHECK(failures > 0);
    child.cache = f.cache.fork();
  };
  attempt([&] { Batch(2, kHeadDim, 1, 40, 9).append_to(child.cache, kHeadDim); });
  attempt([&] { child.cache.retain({iota(1, 40), iota(0, 33)}); });
  attempt([&] { child.cache.compact_positions(Rope(RopeConfig{}, kHeadDim)); });
  attempt([&] { (void)child.cache.fork(); });
}

TEST_CASE("bad arguments throw and change nothing") {
  const auto pool = make_pool(64);
  Filled f = filled(pool, 2, 10);
  const std::vector<std::vector<std::vector<i32>>> lists = {{{0, 1}},     {{0}, {0}, {0}}, {{1, 0}, {}},
                                                            {{2, 2}, {}}, {{-1}, {}},      {{}, {10}}};
  for (const auto& list : lists) CHECK_THROWS_AS(f.cache.retain(list), Error);
  CHECK_THROWS_WITH(f.cache.retain({{}, {3, 3}}), doctest::Contains("3 after 3 (KV head 1, entry 1)"));

  const Buffer<float> x = upload(std::vector<float>(2 * 4 * kHeadDim));
  const auto append = [&](Dtype dtype, i64 stride, i64 n, i64 first) {
    f.cache.append(x.data(), x.data(), dtype, stride, n, first);
  };
  CHECK_THROWS_AS(append(Dtype::u16, 4 * kHeadDim, 4, 10), Error);
  CHECK_THROWS_AS(append(Dtype::f32, 4 * kHeadDim - 1, 4, 10), Error);
  CHECK_THROWS_AS(append(Dtype::f32, 4 * kHeadDim, -1, 10), Error);
  CHECK_THROWS_AS(append(Dtype::f32, 4 * kHeadDim, 4, 9), Error);
  CHECK_THROWS_AS(append(Dtype::f32, 4 * kHeadDim, 4, (1ll << 31) - 3), Error);
  append(Dtype::f32, 0, 0, 0);  // nothing to append is fine
  CHECK(differences(f.cache, f.model, true) == 0);

  // Only the cached positions count: once its last tokens are gone, a sequence may go on from there.
  f.cache.retain({iota(0, 5), {}});
  CHECK_THROWS_AS(append(Dtype::f32, 4 * kHeadDim, 4, 4), Error);
  append(Dtype::f32, 4 * kHeadDim, 4, 5);
  CHECK(f.cache.positions(1) == iota(5, 9));

  CHECK_THROWS_AS(make_pool(0), Error);
  CHECK_THROWS_AS(make_pool(1, 0), Error);
  CHECK_THROWS_AS(make_pool(1ll << 31), Error);
  CHECK_THROWS_AS(make_pool(1, 16, Dtype::u8), Error);
  CHECK_THROWS_AS(KvCache(pool, 0, 16), Error);
  CHECK_THROWS_AS(KvCache(pool, 1, 0), Error);
  CHECK_THROWS_AS(f.cache.compact_positions(Rope(RopeConfig{}, kHeadDim + 2)), Error);
}

TEST_CASE("poison: freed pages, cut tails and slots past the pages read as NaN") {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    const auto pool = make_pool(8, 16, dtype);
    Filled f = filled(pool, 1, 40, 100, dtype);
    const std::vector<i32> pages = physical_pages(f.cache, 0);
    const Filled fork{f.cache.fork(), f.model};
    f.cache.retain({iota(0, 20)});
    retain(f.model, {iota(0, 20)});
    CHECK(differences(f.cache, f.model, true) == 0);  // looks past the length, up to max_pages
    CHECK(differences(fork.cache, fork.model, true) == 0);
    f.cache.retain({{}});
    f.cache = fork.cache.fork();
    f.cache.retain({{0}});
    const HostView host(f.cache, 8);
    const sdk::Paged& kv = host.kv;
    i64 finite = 0, in_use = 0;
    for (i64 slot = 0; slot < 8 * 16; ++slot) {
      const float key = sdk::load(kv.k, dtype, slot * kHeadDim), value = sdk::load(kv.v, dtype, slot * kHeadDim);
      finite += !std::isnan(key) || !std::isnan(value);
      in_use += kv.position[slot] >= 0;
    }
    CHECK(finite == 40 + 1);
    CHECK(in_use == 40 + 1);
  }
}

TEST_CASE("compacted positions: each key sits at its slot, once, and forks keep theirs") {
  const i32 n = 50;
  const Rope rope(RopeConfig{}, kHeadDim);
  const auto pool = make_pool(64);
  Filled f{KvCache(pool, 1, 100), Model(1)};
  Batch batch(1, kHeadDim, n, 0, 3);
  const std::vector<float> before_rope = batch.k;
  for (i32 i = 0; i < n; ++i) rope.rotate(batch.k.data() + i * kHeadDim, i);
  batch.append_to(f.cache, kHeadDim);
  batch.append_to(f.model, kHeadDim, Dtype::f32);
  Filled fork{f.cache.fork(), f.model};

  std::vector<i32> kept = iota(0, 18);
  for (i32 i = 30; i < n; ++i) kept.push_back(i);
  const auto worst = [&](const KvCache& cache) {
    double error = 0;
    const HostView host(cache);
    const sdk::Paged& kv = host.kv;
    for (i32 s = 0; s < kv.length[0]; ++s) {
      const i32 token = kv.position_of(0, s);
      std::vector<float> row(before_rope.begin() + token * kHeadDim, before_rope.begin() + (token + 1) * kHeadDim);
      rope.rotate(row.data(), s);
      for (i32 c = 0; c < kHeadDim; ++c)
        error = std::max(error, std::abs(static_cast<double>(row[static_cast<std::size_t>(c)]) - kv.key(0, s, c)));
    }
    return error;
  };
  f.cache.retain({kept});
  CHECK(worst(f.cache) > 0.1);  // still at their old positions
  f.cache.compact_positions(rope);
  CHECK(worst(f.cache) < 2e-6);
  CHECK(f.cache.positions(0) == kept);
  const KvCache twin = f.cache.fork();  // remembers too
  KvCache again = f.cache.fork();
  const i64 in_use = pool->pages_in_use();
  again.compact_positions(rope);
  CHECK(pool->pages_in_use() == in_use);  // nothing to rotate, so nothing was copied
  kept.erase(kept.begin() + 2);
  std::vector<i32> slots = iota(0, 38);
  slots.erase(slots.begin() + 2);
  f.cache.retain({slots});
  f.cache.compact_positions(rope);
  CHECK(worst(f.cache) < 2e-6);
  CHECK(worst(twin) < 2e-6);
  CHECK(worst(again) < 2e-6);
  CHECK(f.cache.positions(0) == kept);
  CHECK(differences(fork.cache, fork.model, true) == 0);
}

}  // namespace kv_test
