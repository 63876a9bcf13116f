// Vertical-slash (Jiang et al. 2024, "MInference 1.0: accelerating pre-filling for long-context LLMs via dynamic sparse
// attention", arXiv 2407.02490)
//
//   A = causal softmax of the last `last_q` queries;  column(j) = sum A[., j];  diagonal(o) = sum of A over cells q - k
//   = o the first `forced_columns` columns and the nearest `forced_diagonals` offsets rank first, ties go to the lower
//   one; the best v columns and s diagonals are lowered, per tile of queries [m, e), to pieces and single columns:
//     minference: a diagonal o < e covers one tile-wide range that ends at t = max(e - o, tile), aligned to nothing.
//       From far to near with the open range [a, b):  t <= b: nothing;  t <= b + tile: b += tile (may overshoot t);
//       else emit [a, b) in pieces and open [t - tile, t).  Columns outside every range are gathered.
//     aligned: a diagonal covers the aligned blocks that it crosses.
//   budget: v = max(forced_columns, n), s = max(forced_diagonals, n) for the largest n whose lowered pairs, summed over
//     the head, stay within the head's target. `columns`, `diagonals` stand instead of a budget.
#include <algorithm>
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i32 kColumns = 1000, kDiagonals = 6096;  // the commonest pair of the published tables
constexpr i32 kLeastDiagonals = 50;                // the original raises smaller counts to this
constexpr i32 kProbes = 32;                        // lowering is not monotone in n: look a little past the bisection

/// A tile of queries at slots [begin, end); `tile` rows unless it is the last one.
struct Tile {
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
struct Lowering {
  const i32 *columns, *diagonals;
  i32 num_columns, num_diagonals;
  i32 *pieces, *tokens;  // null: count only
  i32 num_pieces = 0, num_tokens = 0, next_column = 0;
  i64 pairs = 0;

  /// Emits the range [a, b) and the columns between it and the range before.
  LACUNA_HD void close(const Tile& t, i64 a, i64 b) {
    for (; next_column < num_columns && columns[next_column] < a; ++next_column, ++num_tokens) {
      if (tokens) tokens[num_tokens] = columns[next_column];
      pairs += t.end - t.begin;  // below the range of offset 0, so every query of the tile sees it
    }
    while (next_column < num_columns && columns[next_column] < b) ++next_column;
    for (i64 at = a; at < b && at < t.end; at += t.block, ++num_pieces) {
      if (pieces) pieces[num_pieces] = static_cast<i32>(at);
      pairs += t.pairs(at);
    }
  }

  LACUNA_HD void run(const Tile& t) {
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

struct VerticalSlash : Strategy {
  struct Params {
    i32 last_q = 64, forced_columns = 30, forced_diagonals = 100, columns = 0, diagonals = 0, block = 64, q_tile = 64;
    std::string lowering = "minference";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("last_q", &Params::last_q, "last queries whose attention ranks", "1..")
        .field("forced_columns", &Params::forced_columns, "first columns, taken first", "0..")
        .field("forced_diagonals", &Params::forced_diagonals, "nearest offsets, taken first", "1..")
        .field("columns", &Params::columns, "columns, instead of a budget; 0: from the budget, without one 1000", "0..")
        .field("diagonals", &Params::diagonals, "diagonals, instead of a budget; 0: from the budget, without one 6096",
               "0..")
        .field("block", &Params::block, "tokens of a piece", "1..")
        .field("q_tile", &Params::q_tile, "queries of a tile", "1..")
        .field("lowering", &Params::lowering, "pieces at any token, or the aligned blocks crossed",
               "minference|aligned")
        .require("block, q_tile", "q_tile is a multiple of block",
                 [](const Params& p) { return p.q_tile % p.block == 0; });
  }
  static Info info() {
    Info i{};
    i.name = "vertical_slash";
    i.summary = "columns and diagonals with the most attention from the last queries";
    i.paper = "Jiang et al. 2024, arXiv 2407.02490";
    i.rule = "best v columns and s diagonals of the last queries' softmax, lowered to pieces and gathered columns";
    i.phases = kPrefill;
    i.presets = R"({"original": {},
      "sparse_frontier": {"last_q": 256, "forced_columns": 4, "forced_diagonals": 64}})";
    i.dense_point = R"({"density": 1.0})";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.q_tile = params.q_tile;
    p.unit_tokens = params.block;
    p.per_query_head = common.gqa == Gqa::none || common.gqa == Gqa::union_;
    p.max_pieces = (p.max_cached + 2 * params.q_tile) / params.block;  // disjoint, the last range may overshoot
    p.max_tokens = p.max_cached;
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    const i64 tiles = (p.max_cached + params.q_tile - 1) / params.q_tile;
    p.workspace_bytes = 6 * (heads * p.max_cached * 4 + 256) + heads * tiles * 8 + 256 + 9 * (heads * 8 + 256);
  }

  /// One entry per (sequence, head).
  struct Heads {
    i64 count, length, forced_v, forced_s;
    float *column, *diagonal;          // [count, length] scores
    i32 *n, *v, *s;                    // [count] candidates, columns and diagonals wanted
    i32 *columns, *diagonals;          // [count, length] the chosen ones, ascending
    i32 *num_columns, *num_diagonals;  // [count]
    i32 *lo, *hi, *n_tried;            // [count] the search

    LACUNA_HD void want(i64 i, i64 columns_wanted, i64 diagonals_wanted) const {
      v[i] = static_cast<i32>(columns_wanted < length ? columns_wanted : length);
      s[i] = static_cast<i32>(diagonals_wanted < length ? diagonals_wanted : length);
    }
    LACUNA_HD void want(i64 i, i64 both) const {
      want(i, both > forced_v ? both : forced_v, both > forced_s ? both : forced_s);
    }
  };

  void mark(Context& c, const Budget& budget, Selection& out) override {
    const bool search = budget.limited && params.columns == 0 && params.diagonals == 0;
    const Heads h = rank(c, budget);
    if (search) {
      find_sizes(c, budget, h);
    } else {
      const i64 v = std::max<i64>(params.columns ? params.columns : kColumns, h.forced_v);
      const i64 s = std::max<i64>({params.diagonals ? params.diagonals : kDiagonals, kLeastDiagonals, budget.recent});
      c.for_each(h.count, [=] LACUNA_HD(i64 i) { h.want(i, v, s); });
    }
    choose(c, h);
    lower(c, out.rows, h, &out, nullptr);
  }

  /// Scores of every column and diagonal, the forced ones first.
  Heads rank(Context& c, const Budget& budget) {
    const Rows& rows = budget.rows;
    Heads h{};
    h.forced_v = std::max(params.forced_columns, budget.sinks);
    h.forced_s = std::max(params.forced_diagonals, budget.recent);
    h.count = static_cast<i64>(rows.seqs) * rows.heads;
    h.length = rows.first_position + rows.num_queries;
    const Queries q = c.last_queries(params.last_q);
    const i64 query_heads = static_cast<i64>(q.seqs) * q.heads;
    h.column = c.workspace<float>(query_heads * h.length);
    h.diagonal = c.workspace<float>(query_heads * h.length);
    c.window_mass(q, Reduce::sum, h.column, h.diagonal, h.length);
    if (!rows.per_query_head) {
      const Reduce reduce = common.gqa == Gqa::max ? Reduce::max : Reduce::sum;
      float* column = c.workspace<float>(h.count * h.length);
      float* diagonal = c.workspace<float>(h.count * h.length);
      c.group_reduce(h.column, column, h.length, h.length, reduce);
      c.group_reduce(h.diagonal, diagonal, h.length, h.length, reduce);
      h.column = column;
      h.diagonal = diagonal;
    }
    h.columns = c.workspace<i32>(h.count * h.length);
    h.diagonals = c.workspace<i32>(h.count * h.length);
    for (i32** list : {&h.n, &h.v, &h.s, &h.num_columns, &h.num_diagonals, &h.lo, &h.hi, &h.n_tried})
      *list = c.workspace<i32>(h.count);
    const float first = INFINITY;
    c.for_each(h.count * h.length, [=] LACUNA_HD(i64 i) {
      const i64 at = i % h.length;
      if (at < h.forced_v) h.column[i] = first;
      if (at < h.forced_s) h.diagonal[i] = first;
      h.n[i / h.length] = static_cast<i32>(h.length);
    });
    return h;
  }

  void choose(Context& c, const Heads& h) {
    const i32 rows = static_cast<i32>(h.count);
    c.topk(h.column, rows, h.length, h.n, h.v, h.columns, h.num_columns, h.length);
    c.topk(h.diagonal, rows, h.length, h.n, h.s, h.diagonals, h.num_diagonals, h.length);
  }

  /// The largest n per head that fits: bisection, then the next few, on the device without reading back.
  void find_sizes(Context& c, const Budget& budget, const Heads& h) {
    const Rows rows = budget.rows;
    const i64 tiles = rows.tiles, length = h.length;
    const i64* target = budget.pairs;
    const double density = budget.density;
    i64* pairs = c.workspace<i64>(rows.count());
    c.for_each(h.count, [=] LACUNA_HD(i64 i) { h.hi[i] = static_cast<i32>(length) + 1; });
    i32 rounds = 0;
    while ((i64{1} << rounds) <= length) ++rounds;
    for (i32 round = 0; round < rounds + kProbes; ++round) {
      const i32 probe = round - rounds + 1;  // from 1 on: past the first n that did not fit
      c.for_each(h.count, [=] LACUNA_HD(i64 i) {
        const i64 n = probe < 1 ? (h.lo[i] + h.hi[i]) / 2 : h.hi[i] + probe;
        h.n_tried[i] = static_cast<i32>(n < length ? n : length);
        h.want(i, n);
      });
      choose(c, h);
      lower(c, rows, h, nullptr, pairs);
      c.for_each(h.count, [=] LACUNA_HD(i64 i) {
        double limit = 0, used = 0;  // a density bounds the head's pairs itself, finer than its rows' whole K
        for (i64 row = i * tiles; row < (i + 1) * tiles; ++row) {
          const i64 first = rows.first_position + rows.query_begin(row),
                    last = rows.first_position + rows.query_end(row);
          const double visible = .5 * static_cast<double>((last - first) * (first + last + 1));
          limit += density > 0 ? density * visible : static_cast<double>(target[row]);
          used += static_cast<double>(pairs[row]);
        }
        if (used <= limit)
          h.lo[i] = h.n_tried[i];
        else if (probe < 1)
          h.hi[i] = h.n_tried[i];
      });
    }
    c.for_each(h.count, [=] LACUNA_HD(i64 i) { h.want(i, h.lo[i]); });
  }

  /// Lowers every row into `out`, or only counts its pairs.
  void lower(Context& c, const Rows& rows, const Heads& h, const Selection* out, i64* pairs) {
    const i64 tile = params.q_tile, block = params.block;
    const bool aligned = params.lowering == "aligned", emit = out != nullptr;
    const Selection to = emit ? *out : Selection{};
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 head = row / rows.tiles;
      const Tile t{rows.first_position + rows.query_begin(row), rows.first_position + rows.query_end(row), tile, block,
                   aligned};
      Lowering l{h.columns + head * h.length,
                 h.diagonals + head * h.length,
                 h.num_columns[head],
                 h.num_diagonals[head],
                 emit ? to.pieces + row * to.piece_capacity : nullptr,
                 emit ? to.tokens + row * to.token_capacity : nullptr};
      l.run(t);
      if (emit) {
        to.piece_count[row] = l.num_pieces;
        to.token_count[row] = l.num_tokens;
      } else {
        pairs[row] = l.pairs;
      }
    });
    c.charge(4.0 * rows.count() * h.length, 1.0 * rows.count() * h.length);
  }
};
}  // namespace

LACUNA_PLUGIN(VerticalSlash)
