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
#include <lacuna/sdk/search.hpp>
#include <lacuna/sdk/slash.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i32 kColumns = 1000, kDiagonals = 6096;  // the commonest pair of the published tables
constexpr i32 kLeastDiagonals = 50;                // the original raises smaller counts to this
constexpr i32 kProbes = 32;                        // lowering is not monotone in n: look a little past the bisection

LACUNA_HD inline void want_both(const SlashRanking& r, i64 head, i64 n) {
  r.want(head, n > r.forced_columns ? n : r.forced_columns, n > r.forced_diagonals ? n : r.forced_diagonals);
}

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
    p.max_pieces = most_slash_pieces(p.max_cached, params.q_tile, params.block);
    p.max_tokens = p.max_cached;
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    const i64 tiles = (p.max_cached + params.q_tile - 1) / params.q_tile;
    p.workspace_bytes = 6 * (heads * p.max_cached * 4 + 256) + heads * tiles * 8 + 256 + 9 * (heads * 4 + 256);
  }

  void mark(Context& c, const Budget& budget, Selection& out) override {
    const SlashRanking r =
        rank_slashes(c, c.last_queries(params.last_q), budget.rows, common.gqa,
                     std::max(params.forced_columns, budget.sinks), std::max(params.forced_diagonals, budget.recent));
    const Slashes chosen{r.heads,
                         r.length,
                         c.workspace<i32>(r.heads * r.length),
                         c.workspace<i32>(r.heads * r.length),
                         c.workspace<i32>(r.heads),
                         c.workspace<i32>(r.heads)};
    if (budget.limited && params.columns == 0 && params.diagonals == 0) {
      find_sizes(c, budget, r, chosen);
    } else {
      const i64 v = std::max<i64>(params.columns ? params.columns : kColumns, r.forced_columns);
      const i64 s = std::max<i64>({params.diagonals ? params.diagonals : kDiagonals, kLeastDiagonals, budget.recent});
      c.for_each(r.heads, [=] LACUNA_HD(i64 i) { r.want(i, v, s); });
    }
    choose_slashes(c, r, chosen);
    lower_slashes(c, out.rows, chosen, params.block, params.lowering == "aligned", &out, nullptr);
  }

  /// The largest n per head that fits; leaves it wanted.
  void find_sizes(Context& c, const Budget& budget, const SlashRanking& r, const Slashes& chosen) {
    const Rows rows = budget.rows;
    const i64 tiles = rows.tiles;
    const i64* target = budget.pairs;
    const double density = budget.density;
    i64* pairs = c.workspace<i64>(rows.count());
    i32* fits = c.workspace<i32>(r.heads);
    const LargestThatFits search = search_largest(c, r.heads, r.length, kProbes);
    for (i32 round = 0; round < search.rounds(); ++round) {
      search.propose(c, round);
      c.for_each(r.heads, [=] LACUNA_HD(i64 i) { want_both(r, i, search.tried[i]); });
      choose_slashes(c, r, chosen);
      lower_slashes(c, rows, chosen, params.block, params.lowering == "aligned", nullptr, pairs);
      c.for_each(r.heads, [=] LACUNA_HD(i64 i) {
        double limit = 0, used = 0;  // a density bounds the head's pairs itself, finer than its rows' whole K
        for (i64 row = i * tiles; row < (i + 1) * tiles; ++row) {
          const i64 first = rows.first_position + rows.query_begin(row),
                    last = rows.first_position + rows.query_end(row);
          const double visible = .5 * static_cast<double>((last - first) * (first + last + 1));
          limit += density > 0 ? density * visible : static_cast<double>(target[row]);
          used += static_cast<double>(pairs[row]);
        }
        fits[i] = used <= limit;
      });
      search.judge(c, round, fits);
    }
    c.for_each(r.heads, [=] LACUNA_HD(i64 i) { want_both(r, i, search.best[i]); });
  }
};
}  // namespace

LACUNA_PLUGIN(VerticalSlash)
