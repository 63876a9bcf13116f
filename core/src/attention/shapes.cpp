#include "shapes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "lacuna/base/error.hpp"

namespace lacuna {

using sdk::i32;
using sdk::i64;

namespace {

constexpr i64 kMostQueries = 128;  // of a reader: more would compute too many cells above the diagonal

[[noreturn]] void misfit(std::string what, std::string expected, std::string found) {
  throw Error({std::move(what), std::move(expected), std::move(found), "attention", ""});
}

void check_selection_shape(const Attention& a) {
  const sdk::Rows& r = a.read->rows;
  const i32 heads = r.per_query_head ? a.layer.num_qo_heads : a.layer.num_kv_heads;
  if (r.seqs != a.q.seqs || r.heads != heads || r.num_queries != a.q.count)
    misfit("the selection's rows are not those of the queries",
           fmt::format("{} sequences, {} heads, {} queries", a.q.seqs, heads, a.q.count),
           fmt::format("{} sequences, {} heads, {} queries", r.seqs, r.heads, r.num_queries));
  if (r.q_tile < 1 || r.tile_begin < 0 || static_cast<i64>(r.tile_begin + r.tiles - 1) * r.q_tile >= r.num_queries)
    misfit("the selection's tiles lie outside the queries", fmt::format("tiles of {} queries", r.num_queries),
           fmt::format("tiles {}..{} of {} queries each", r.tile_begin, r.tile_begin + r.tiles, r.q_tile));
  if (a.layer.sliding_window > 0)
    misfit("a layer with a sliding window is read through a selection", "dense reading",
           fmt::format("layer {}", a.layer.index));
}

}  // namespace

void check_layout(const Attention& a) {
  const sdk::Layer& layer = a.layer;
  if (layer.num_kv_heads < 1 || layer.num_qo_heads < 1 || layer.num_qo_heads % layer.num_kv_heads != 0)
    misfit("query heads are not a multiple of KV heads", "num_qo_heads = group * num_kv_heads",
           fmt::format("{} and {}", layer.num_qo_heads, layer.num_kv_heads));
  if (a.q.heads != layer.num_qo_heads || a.q.head_dim != layer.head_dim || a.kv.head_dim != layer.head_dim)
    misfit("queries or cache have another shape than the layer",
           fmt::format("{} heads of {}", layer.num_qo_heads, layer.head_dim),
           fmt::format("queries: {} heads of {}, keys of {}", a.q.heads, a.q.head_dim, a.kv.head_dim));
  if (a.kv.rows != a.q.seqs * layer.num_kv_heads)
    misfit("the cache has another number of rows than the queries ask for",
           fmt::format("{}", a.q.seqs * layer.num_kv_heads), fmt::format("{}", a.kv.rows));
  if (a.read) check_selection_shape(a);
}

void check_shapes(const Attention& a) {
  check_layout(a);
  for (i64 row = 0; row < a.kv.rows; ++row)
    if (a.kv.length[row] < a.q.count)
      misfit("the queries are not in the cache", fmt::format("at least {} cached tokens", a.q.count),
             fmt::format("{} in KV row {}", a.kv.length[row], row));
}

std::vector<Reader> split_queries(const Attention& a, i64 most_lanes) {
  std::vector<Reader> out;
  const i32 group = a.layer.group();
  const auto add = [&](i64 seq, i32 head, i32 heads, i64 begin, i64 end, i64 row) {
    const i64 kv_row = seq * a.layer.num_kv_heads + head / group;
    const i64 step = std::clamp<i64>(most_lanes / heads / kLaneStep * kLaneStep, kLaneStep, kMostQueries);
    for (; begin < end; begin += step)
      out.push_back({{seq, begin, std::min(end, begin + step), head, heads, kv_row}, row});
  };
  if (!a.read) {
    for (i64 seq = 0; seq < a.q.seqs; ++seq)
      for (i32 h = 0; h < a.layer.num_kv_heads; ++h) add(seq, h * group, group, 0, a.q.count, -1);
    return out;
  }
  const sdk::Rows& rows = a.read->rows;
  for (i64 row = 0; row < rows.count(); ++row) {
    const i32 heads = rows.per_query_head ? 1 : group;
    add(rows.seq_of(row), rows.head_of(row) * heads, heads, rows.query_begin(row), rows.query_end(row), row);
  }
  return out;
}

std::vector<i32> query_slots(const Attention& a, const TileQueries& queries) {
  std::vector<i32> out(static_cast<std::size_t>(queries.count()));
  std::iota(out.begin(), out.end(), static_cast<i32>(slot_of_query(a, queries.kv_row, queries.begin)));
  return out;
}

KeyList reader_keys(const Attention& a, const Reader& reader, i64* pairs) {
  const TileQueries& q = reader.queries;
  const i64 begin = slot_of_query(a, q.kv_row, q.begin), end = begin + q.count();
  if (reader.row >= 0) {
    const RowSet set = expand_row(*a.read, reader.row, end);
    *pairs = set.pairs(begin, end) * q.heads;
    return set_keys(set, begin, end, !a.ignore_weights);
  }
  KeyList keys = dense_keys(a.kv, q.kv_row, begin, end, a.layer.sliding_window);
  *pairs = 0;
  for (i64 i = 0; i < keys.size(); ++i) {
    const auto k = static_cast<std::size_t>(i);
    *pairs += std::min<i64>(end, keys.until[k]) - std::max<i64>(begin, keys.slot[k]);
  }
  *pairs *= q.heads;
  return keys;
}

}  // namespace lacuna
