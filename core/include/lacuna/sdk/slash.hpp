// Columns (keys that every query reads) and diagonals (offsets query - key) of causal prefill attention: their mass,
// and their lowering to the pieces and tokens of a selection, as MInference (Jiang et al. 2024, arXiv 2407.02490) does
// it.
//
// In a tile of queries, chosen diagonals become ranges of keys, columns outside them single tokens.
//   anywhere: a diagonal covers q_tile keys up to the tile's last query at that offset; ranges that touch grow by whole
//             tiles; a range is read in pieces of `block` tokens from its own beginning.
//   aligned:  a diagonal covers the aligned blocks that it crosses.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// A tile of queries at slots [begin, end); `tile` rows unless it is the last one.
struct SlashTile {
  i64 begin, end, tile, block;
  bool aligned;

  /// Cells of the piece [at, at + block) that the tile's queries see.
  LACUNA_HD i64 pairs(i64 at) const {
    if (at + block <= begin + 1) return (end - begin) * block;
    i64 sum = 0;
    for (i64 q = begin > at ? begin : at; q < end; ++q) sum += q + 1 - at < block ? q + 1 - at : block;
    return sum;
  }
};

/// Ascending lists of a head's columns and offsets; what becomes of them in one tile.
struct SlashLowering {
  const i32 *columns, *diagonals;
  i32 num_columns, num_diagonals;
  i32 *pieces, *tokens;  // null: count only
  i32 num_pieces = 0, num_tokens = 0, next_column = 0;
  i64 pairs = 0;

  /// Emits the range [a, b) and the columns between it and the range before.
  LACUNA_HD void close(const SlashTile& t, i64 a, i64 b) {
    for (; next_column < num_columns && columns[next_column] < a; ++next_column, ++num_tokens) {
      if (tokens) tokens[num_tokens] = columns[next_column];
      pairs += t.end - t.begin;  // below the tile, so every query of it sees the column
    }
    while (next_column < num_columns && columns[next_column] < b) ++next_column;
    for (i64 at = a; at < b && at < t.end; at += t.block, ++num_pieces) {
      if (pieces) pieces[num_pieces] = static_cast<i32>(at);
      pairs += t.pairs(at);
    }
  }

  LACUNA_HD void run(const SlashTile& t) {
    const i64 rows_end = t.aligned ? t.end : t.begin + t.tile;  // the original's last tile is padded
    i64 a = 0, b = -1;
    for (i32 i = num_diagonals - 1; i >= 0; --i) {
      const i64 offset = diagonals[i];
      if (offset >= rows_end) continue;
      i64 first, last;
      if (t.aligned) {
        first = (t.begin > offset ? t.begin - offset : 0) / t.block * t.block;
        last = ((rows_end - 1 - offset) / t.block + 1) * t.block;
        if (b >= first) {
          b = last > b ? last : b;
          continue;
        }
      } else {
        last = rows_end - offset > t.tile ? rows_end - offset : t.tile;
        first = last - t.tile;
        if (b >= first) {
          if (last > b) b += t.tile;
          continue;
        }
      }
      if (b >= 0) close(t, a, b);
      a = first;
      b = last;
    }
    close(t, a, b);
  }
};

/// The columns and diagonals of every head, ascending.
struct Slashes {
  i64 heads, length;                 // (sequence, head) rows; columns of the prompt
  i32 *columns, *diagonals;          // [heads, length]
  i32 *num_columns, *num_diagonals;  // [heads]
};

/// Their mass in some queries' attention, a row per (sequence, head).
struct SlashMass {
  float *column, *diagonal;  // [heads, length]
};

/// Softmax mass of every column and diagonal, summed over the queries; reduced over the group (max, else sum) where
/// `rows` are KV heads. Workspace: two arrays [query heads, length], and two more [KV heads, length] where reduced.
inline SlashMass slash_mass(Context& c, const Queries& q, const Rows& rows, Gqa gqa, i64 length) {
  const i64 query_heads = static_cast<i64>(q.seqs) * q.heads, heads = static_cast<i64>(rows.seqs) * rows.heads;
  SlashMass out{c.workspace<float>(query_heads * length), c.workspace<float>(query_heads * length)};
  c.window_mass(q, Reduce::sum, out.column, out.diagonal, length);
  if (rows.per_query_head) return out;
  const Reduce reduce = gqa == Gqa::max ? Reduce::max : Reduce::sum;
  const SlashMass reduced{c.workspace<float>(heads * length), c.workspace<float>(heads * length)};
  c.group_reduce(out.column, reduced.column, length, length, reduce);
  c.group_reduce(out.diagonal, reduced.diagonal, length, length, reduce);
  return reduced;
}

/// Columns and diagonals of every head by mass, the forced ones first, and how many of each are wanted.
struct SlashRanking {
  i64 heads, length, forced_columns, forced_diagonals;
  SlashMass mass;
  i32 *n, *columns, *diagonals;  // [heads] candidates; wanted

  LACUNA_HD void want(i64 head, i64 v, i64 s) const {
    columns[head] = static_cast<i32>(v < length ? v : length);
    diagonals[head] = static_cast<i32>(s < length ? s : length);
  }
};

/// Ranks them by the attention of the queries `q`: the first columns and the nearest diagonals that are forced come
/// first. Workspace: that of slash_mass, and three arrays [heads].
inline SlashRanking rank_slashes(Context& c, const Queries& q, const Rows& rows, Gqa gqa, i64 forced_columns,
                                 i64 forced_diagonals) {
  SlashRanking r{};
  r.forced_columns = forced_columns;
  r.forced_diagonals = forced_diagonals;
  r.heads = static_cast<i64>(rows.seqs) * rows.heads;
  r.length = rows.first_position + rows.num_queries;
  r.mass = slash_mass(c, q, rows, gqa, r.length);
  for (i32** list : {&r.n, &r.columns, &r.diagonals}) *list = c.workspace<i32>(r.heads);
  const float first = INFINITY;
  c.for_each(r.heads * r.length, [=] LACUNA_HD(i64 i) {
    const i64 at = i % r.length;
    if (at < r.forced_columns) r.mass.column[i] = first;
    if (at < r.forced_diagonals) r.mass.diagonal[i] = first;
    r.n[i / r.length] = static_cast<i32>(r.length);
  });
  return r;
}

/// The wanted ones of every head, ties to the lower column or offset.
inline void choose_slashes(Context& c, const SlashRanking& r, const Slashes& out) {
  const i32 heads = static_cast<i32>(r.heads);
  c.topk(r.mass.column, heads, r.length, r.n, r.columns, out.columns, out.num_columns, r.length);
  c.topk(r.mass.diagonal, heads, r.length, r.n, r.diagonals, out.diagonals, out.num_diagonals, r.length);
}

/// Pieces that a tile can have: they are disjoint, and the last range may overshoot the diagonal.
inline i64 most_slash_pieces(i64 length, i64 q_tile, i64 block) { return (length + 2 * q_tile) / block; }

/// Lowers every row into `out`, or only counts its (query, key) pairs [rows] where `out` is null. Rows hold q_tile
/// queries, pieces `block` tokens; block divides q_tile.
inline void lower_slashes(Context& c, const Rows& rows, const Slashes& lists, i64 block, bool aligned,
                          const Selection* out, i64* pairs) {
  const bool emit = out != nullptr;
  const Selection to = emit ? *out : Selection{};
  c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
    const i64 head = row / rows.tiles;
    const SlashTile tile{rows.first_position + rows.query_begin(row), rows.first_position + rows.query_end(row),
                         rows.q_tile, block, aligned};
    SlashLowering l{lists.columns + head * lists.length,
                    lists.diagonals + head * lists.length,
                    lists.num_columns[head],
                    lists.num_diagonals[head],
                    emit ? to.pieces + row * to.piece_capacity : nullptr,
                    emit ? to.tokens + row * to.token_capacity : nullptr};
    l.run(tile);
    if (emit) {
      to.piece_count[row] = l.num_pieces;
      to.token_count[row] = l.num_tokens;
    } else {
      pairs[row] = l.pairs;
    }
  });
  c.charge(4.0 * rows.count() * lists.length, 1.0 * rows.count() * lists.length);
}

}  // namespace lacuna::sdk
