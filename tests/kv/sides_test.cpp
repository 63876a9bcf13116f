#include <algorithm>
#include <utility>

#include "support.hpp"

namespace kv_test {
namespace {

constexpr i32 kHeadDim = 4;

std::shared_ptr<PagePool> make_pool(bool poison = true) {
  return std::make_shared<PagePool>(test_device(), 16, kHeadDim, Dtype::f32, 200, poison);
}
void append(KvCache& cache, i32 heads, i64 n, i64 first) {
  Batch(heads, kHeadDim, n, first, 1).append_to(cache, kHeadDim);
}

float element(const sdk::Array& side, i64 head, i64 unit, i64 e = 0) { return SideCopy<float>(side).at(head, unit, e); }
void set(const sdk::Array& side, i64 head, i64 unit, i64 e, float value) {
  SideCopy<float> copy(side);
  copy.at(head, unit, e) = value;
  copy.write_back();
}

using Ranges = std::vector<std::pair<i32, i32>>;
Ranges take(KvCache& cache, i32 unit_tokens) {
  const sdk::Dirty dirty = cache.take_dirty(unit_tokens);
  CHECK(dirty.unit_tokens == unit_tokens);
  const std::vector<i32> begin = download(dirty.begin, dirty.rows), end = download(dirty.end, dirty.rows);
  Ranges out;
  i32 most = 0;
  for (std::size_t h = 0; h < begin.size(); ++h) {
    out.emplace_back(begin[h], end[h]);
    most = std::max(most, end[h] - begin[h]);
  }
  CHECK(dirty.max_units == most);
  return out;
}

const sdk::Side kMoving{"moving", sdk::SidePer::token, 0, Dtype::f32, 2, 1};
const sdk::Side kStaying{"staying", sdk::SidePer::token, 0, Dtype::u16, 1, 0};
const sdk::Side kUnits{"units", sdk::SidePer::unit, 16, Dtype::f32, 3, 0};

}  // namespace

TEST_CASE("sides: shape, zeros in use, poison beyond, bytes of the units in use") {
  for (const bool poison : {true, false}) {
    KvCache cache(make_pool(poison), 2, 100);
    append(cache, 2, 20, 0);
    cache.add_side(kUnits);
    cache.add_side(kStaying);
    const auto check = [&](i64 used_by_0, i64 used_by_1) {
      const sdk::Array units = cache.side("units"), codes = cache.side("staying");
      CHECK(units.extent[0] == 2);
      CHECK(units.extent[1] == 7);
      CHECK(units.extent[2] == 3);
      CHECK(codes.extent[1] == 100);
      SideCopy<float> unit(units);
      SideCopy<u16> code(codes);
      for (i64 h = 0; h < 2; ++h) {
        for (i64 u = 0; u < 7; ++u) {
          const i64 used = h == 0 ? used_by_0 : used_by_1;
          const float x = unit.at(h, u, 2);
          CHECK((u < used || !poison ? x == 0 : std::isnan(x)));
        }
        for (i64 i = 0; i < 100; ++i) CHECK(code.at(h, i) == 0);
      }
    };
    check(2, 2);
    CHECK(cache.side_bytes() == 2 * (2 * 3 * 4 + 20 * 2));
    append(cache, 2, 13, 20);
    check(3, 3);
    set(cache.side("units"), 1, 2, 2, 5);
    cache.retain({iota(0, 32), iota(0, 20)});
    CHECK(cache.side_bytes() == 2 * 2 * 3 * 4 + (32 + 20) * 2);
    check(2, 2);
    append(cache, 2, 1, 33);
    check(3, 2);
  }
}

TEST_CASE("sides that move are carried along by retain and stay up to date") {
  KvCache cache(make_pool(), 2, 100);
  cache.add_side(kMoving);
  append(cache, 2, 40, 0);
  CHECK(take(cache, 1) == Ranges{{0, 40}, {0, 40}});
  SideCopy<float> before(cache.side("moving"));
  for (i64 h = 0; h < 2; ++h) {
    for (i64 i = 0; i < 40; ++i) before.at(h, i, 1) = static_cast<float>(100 * h + i);
  }
  before.write_back();
  append(cache, 2, 2, 40);
  cache.retain({{1, 5, 30, 41}, iota(0, 41)});
  const sdk::Array after = cache.side("moving");
  CHECK(element(after, 0, 0, 1) == 1);
  CHECK(element(after, 0, 1, 1) == 5);
  CHECK(element(after, 0, 2, 1) == 30);
  CHECK(element(after, 0, 3, 1) == 0);  // came after the last update
  CHECK(std::isnan(element(after, 0, 4, 1)));
  CHECK(element(after, 1, 39, 1) == 139);
  CHECK(take(cache, 1) == Ranges{{3, 4}, {40, 41}});
  CHECK(take(cache, 1) == Ranges{{4, 4}, {41, 41}});
  cache.compact_positions(Rope(RopeConfig{}, kHeadDim));  // new keys: what was made of them is stale
  CHECK(take(cache, 1) == Ranges{{0, 4}, {41, 41}});

  // One side of the granularity that stays makes all of it dirty from the first change on.
  cache.add_side(kStaying);
  CHECK(take(cache, 1) == Ranges{{0, 4}, {0, 41}});
  cache.retain({{0, 2, 3}, iota(0, 41)});
  CHECK(take(cache, 1) == Ranges{{1, 3}, {41, 41}});
}

TEST_CASE("dirty units: the partial last one on append, from the first change on retain, each granularity for itself") {
  KvCache cache(make_pool(), 1, 200);
  CHECK(take(cache, 16) == Ranges{{0, 0}});
  append(cache, 1, 40, 0);
  CHECK(take(cache, 16) == Ranges{{0, 3}});
  CHECK(take(cache, 16) == Ranges{{3, 3}});
  CHECK(take(cache, 8) == Ranges{{0, 5}});
  append(cache, 1, 1, 40);
  CHECK(take(cache, 16) == Ranges{{2, 3}});
  append(cache, 1, 7, 41);
  append(cache, 1, 1, 48);
  CHECK(take(cache, 16) == Ranges{{2, 4}});
  CHECK(take(cache, 8) == Ranges{{5, 7}});

  std::vector<i32> slots = iota(0, 49);
  cache.retain({slots});
  CHECK(take(cache, 16) == Ranges{{4, 4}});
  slots.erase(slots.begin() + 20);
  cache.retain({slots});
  CHECK(take(cache, 16) == Ranges{{1, 3}});
  cache.retain({iota(0, 40)});
  CHECK(take(cache, 16) == Ranges{{2, 3}});  // holds fewer tokens than before
  cache.retain({iota(0, 32)});
  CHECK(take(cache, 16) == Ranges{{2, 2}});
  CHECK(take(cache, 8) == Ranges{{2, 4}});
  CHECK_THROWS_AS(cache.take_dirty(0), Error);
}

TEST_CASE("a fork inherits sides and what is dirty; writes stay apart") {
  KvCache parent(make_pool(), 1, 100);
  parent.add_side(kMoving);
  parent.add_side(kUnits);
  append(parent, 1, 20, 0);
  take(parent, 16);
  append(parent, 1, 20, 20);
  set(parent.side("moving"), 0, 3, 0, 1);
  KvCache child = parent.fork();
  CHECK(take(parent, 16) == Ranges{{1, 3}});
  CHECK(take(child, 16) == Ranges{{1, 3}});
  CHECK(take(parent, 16) == Ranges{{3, 3}});
  CHECK(child.side_bytes() == parent.side_bytes());

  set(child.side("moving"), 0, 3, 0, 2);
  CHECK(element(parent.side("moving"), 0, 3) == 1);
  child = parent.fork();
  child.retain({{3, 4}});
  CHECK(element(child.side("moving"), 0, 0) == 1);
  CHECK(element(parent.side("moving"), 0, 3) == 1);
  CHECK(element(parent.side("moving"), 0, 0) == 0);
  child = parent.fork();
  append(child, 1, 10, 40);
  CHECK(std::isnan(element(parent.side("moving"), 0, 40)));
}

TEST_CASE("bad sides throw") {
  KvCache cache(make_pool(), 1, 100);
  cache.add_side(kUnits);
  CHECK_THROWS_WITH_AS(cache.side("unit"), doctest::Contains("did you mean 'units'?"), Error);
  CHECK_THROWS_AS(cache.add_side(kUnits), Error);
  CHECK_THROWS_AS(cache.add_side({"", sdk::SidePer::token, 0, Dtype::f32, 1, 0}), Error);
  CHECK_THROWS_AS(cache.add_side({"a", sdk::SidePer::token, 0, Dtype::f32, 0, 0}), Error);
  CHECK_THROWS_AS(cache.add_side({"a", sdk::SidePer::unit, 0, Dtype::f32, 1, 0}), Error);
}

}  // namespace kv_test
