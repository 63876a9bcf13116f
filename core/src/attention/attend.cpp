// fp32 attention: a task is a tile of queries, all the heads of a group that read the same keys in it, so that each
// block of keys is taken from the pages once. A short batch of queries (decode) is cut along the keys instead, into
// pieces of a fixed size, whose states are merged in order: neither cut depends on the number of threads.
#include <cmath>
#include <limits>

#include "lacuna/attention/attention.hpp"
#include "shapes.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr i64 kTaskLanes = 256;   // most lanes of a tile: queries, outputs and a block stay in a core's own cache
constexpr i64 kFewQueries = 16;   // fewer are cut along the keys
constexpr i64 kSplitKeys = 1024;  // keys of such a piece

struct Output {
  const Attention& a;
  float *out, *lse;

  i64 query(const TileQueries& q, i64 h, i64 i) const {
    return (q.seq * a.layer.num_qo_heads + q.head_begin + h) * a.q.count + q.begin + i;
  }
};

void read(const Attention& a, const TileQueries& queries, const KeyList& keys, i64 begin, i64 end, Tile& tile) {
  tile.load_queries(a.q, queries, query_slots(a, queries), a.layer.softmax_scale);
  for (i64 k = begin; k < end; k += Tile::kKeys) {
    tile.load_keys(a.kv, keys, k, static_cast<int>(std::min<i64>(Tile::kKeys, end - k)), true);
    for (int g = 0; g < tile.groups(); ++g) tile.online(g);
  }
}

i64 attend_tiles(const Output& o, const std::vector<Reader>& readers) {
  i64 pairs = 0;
#pragma omp parallel reduction(+ : pairs)
  {
    Tile tile;
    // The last tiles see the most keys: they go first.
#pragma omp for schedule(dynamic)
    for (i64 r = static_cast<i64>(readers.size()) - 1; r >= 0; --r) {
      const Reader& reader = readers[static_cast<std::size_t>(r)];
      const TileQueries& q = reader.queries;
      i64 mine = 0;
      const KeyList keys = reader_keys(o.a, reader, &mine);
      pairs += mine;
      read(o.a, q, keys, 0, keys.size(), tile);
      const std::vector<double>& lse = tile.finish();
      for (i64 h = 0; h < q.heads; ++h)
        for (i64 i = 0; i < q.count(); ++i) {
          const i64 at = o.query(q, h, i), lane = tile.lane(h, i);
          o.lse[at] = static_cast<float>(lse[static_cast<std::size_t>(lane)]);
          tile.output(lane, o.out + at * o.a.layer.head_dim);
        }
    }
  }
  return pairs;
}

i64 attend_pieces(const Output& o, const std::vector<Reader>& readers) {
  struct Piece {
    std::size_t reader;
    i64 begin, end, first_state;
  };
  const i64 d = o.a.layer.head_dim;
  std::vector<KeyList> keys(readers.size());
  std::vector<i64> reader_pairs(readers.size());
#pragma omp parallel for schedule(dynamic)
  for (std::size_t r = 0; r < readers.size(); ++r) keys[r] = reader_keys(o.a, readers[r], &reader_pairs[r]);

  std::vector<Piece> pieces;
  i64 states = 0, pairs = 0;
  for (std::size_t r = 0; r < readers.size(); ++r) {
    pairs += reader_pairs[r];
    i64 begin = 0;
    do {
      const i64 end = std::min(keys[r].size(), begin + kSplitKeys);
      pieces.push_back({r, begin, end, states});
      states += readers[r].queries.heads * readers[r].queries.count();
      begin = end;
    } while (begin < keys[r].size());
  }

  std::vector<float> out(static_cast<std::size_t>(states * d)), lse(static_cast<std::size_t>(states));
#pragma omp parallel
  {
    Tile tile;
#pragma omp for schedule(dynamic)
    for (std::size_t p = 0; p < pieces.size(); ++p) {
      const Piece& piece = pieces[p];
      const TileQueries& q = readers[piece.reader].queries;
      read(o.a, q, keys[piece.reader], piece.begin, piece.end, tile);
      const std::vector<double>& sums = tile.finish();
      for (i64 h = 0; h < q.heads; ++h)
        for (i64 i = 0; i < q.count(); ++i) {
          const i64 state = piece.first_state + h * q.count() + i;
          lse[static_cast<std::size_t>(state)] = static_cast<float>(sums[static_cast<std::size_t>(tile.lane(h, i))]);
          tile.output(tile.lane(h, i), out.data() + state * d);
        }
    }
  }

  for (const Piece& piece : pieces) {
    const TileQueries& q = readers[piece.reader].queries;
    for (i64 h = 0; h < q.heads; ++h)
      for (i64 i = 0; i < q.count(); ++i) {
        const i64 at = o.query(q, h, i), state = piece.first_state + h * q.count() + i;
        float* to = o.out + at * d;
        if (piece.begin == 0) {
          std::fill(to, to + d, 0.f);
          o.lse[at] = -std::numeric_limits<float>::infinity();
        }
        merge(to, o.lse + at, out.data() + state * d, lse[static_cast<std::size_t>(state)], static_cast<i32>(d));
      }
  }
  return pairs;
}

}  // namespace

AttentionWork attend(const Attention& a, float* out, float* lse) {
  check_shapes(a);
  const std::vector<Reader> readers = split_queries(a, kTaskLanes);
  const Output o{a, out, lse};
  AttentionWork work;
  work.pairs = a.q.count < kFewQueries ? attend_pieces(o, readers) : attend_tiles(o, readers);
  if (a.read)
    work.sparse_rows = a.read->rows.count() * (a.read->rows.per_query_head ? 1 : a.layer.group());
  else
    for (const Reader& r : readers) work.dense_rows += r.queries.heads;
  return work;
}

void merge(float* out, float* lse, const float* other_out, float other_lse, i32 head_dim) {
  const double top = std::max(*lse, other_lse);
  if (top == -std::numeric_limits<double>::infinity()) return;
  const double mine = std::exp(*lse - top), theirs = std::exp(other_lse - top), sum = mine + theirs;
  for (i32 c = 0; c < head_dim; ++c) out[c] = static_cast<float>((mine * out[c] + theirs * other_out[c]) / sum);
  *lse = static_cast<float>(top + std::log(sum));
}

}  // namespace lacuna
