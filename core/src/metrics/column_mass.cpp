#include "column_mass.hpp"

#include <limits>
#include <numeric>

namespace lacuna {

using sdk::i32;
using sdk::i64;

namespace {

/// sum[j] += p[j * width + l] over the lanes [begin, end), for j < keys.
void add_lanes(const float* p, int keys, int width, i64 begin, i64 end, double* sum) {
  simd::multiversion([=](auto isa) LACUNA_INLINE_LAMBDA {
    constexpr int kCount = simd::register_bytes(decltype(isa)::value) / static_cast<int>(sizeof(double));
    using Wide = simd::Vector<double, kCount>;
    using Load = const simd::Unaligned<float, kCount>;
    for (int j = 0; j < keys; ++j) {
      const float* row = p + static_cast<i64>(j) * width;
      Wide lanes = {};
      i64 l = begin;
      for (; l + kCount <= end; l += kCount) lanes += __builtin_convertvector(simd::vector_at<Load>(row + l), Wide);
      double total = 0;
      for (int i = 0; i < kCount; ++i) total += lanes[i];
      for (; l < end; ++l) total += row[l];
      sum[j] += total;
    }
  });
}

}  // namespace

void load_tile(Tile& tile, const Attention& a, const TileQueries& which, const float* dense_lse) {
  std::vector<i32> slots(static_cast<std::size_t>(which.count()));
  std::iota(slots.begin(), slots.end(), static_cast<i32>(a.kv.length[which.kv_row] - a.q.count + which.begin));
  tile.load_queries(a.q, which, slots, a.layer.softmax_scale);
  for (i64 h = 0; h < which.heads; ++h) {
    const float* lse = dense_lse + (which.seq * a.layer.num_qo_heads + which.head_begin + h) * a.q.count + which.begin;
    for (i64 i = 0; i < which.count(); ++i) tile.set_lse(tile.lane(h, i), lse[i]);
  }
}

void add_column_mass(Tile& tile, const sdk::Paged& kv, const TileQueries& which, const KeyList& keys, double* mass) {
  for (i64 begin = 0; begin < keys.size(); begin += Tile::kKeys) {
    const int n = static_cast<int>(std::min<i64>(Tile::kKeys, keys.size() - begin));
    tile.load_keys(kv, keys, begin, n, false);
    for (int group = 0; group < tile.groups(); ++group) {
      tile.probabilities(group);
      const i64 first = static_cast<i64>(group) * Tile::kLanes;
      for (i64 h = 0; h < which.heads; ++h) {
        const i64 from = std::max(tile.lane(h, 0), first) - first;
        const i64 to = std::min<i64>(tile.lane(h, which.count()), first + tile.width(group)) - first;
        if (from < to) add_lanes(tile.probability(), n, tile.width(group), from, to, mass + h * keys.size() + begin);
      }
    }
  }
}

KeyList key_range(i64 begin, i64 end) {
  KeyList keys;
  keys.slot.resize(static_cast<std::size_t>(std::max<i64>(0, end - begin)));
  std::iota(keys.slot.begin(), keys.slot.end(), static_cast<i32>(begin));
  keys.until.assign(keys.slot.size(), std::numeric_limits<i32>::max());
  return keys;
}

}  // namespace lacuna
