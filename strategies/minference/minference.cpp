// MInference (Jiang et al. 2024, "MInference 1.0: accelerating pre-filling for long-context LLMs via dynamic sparse
// attention", arXiv 2407.02490): each query head reads by a pattern of its own, from a calibrated table.
//
//   table, per layer: pattern [query heads, 3] = kind, first size, second size
//     0 vertical_slash: columns, diagonals   ranked and lowered as strategy vertical_slash does (last 64 queries; 30
//                                            columns and 100 offsets first; at least 30 and 50)
//     1 a_shape:        sinks, window        as an exact mask
//     2 block_topk:     blocks, -            64-token blocks by mean query . mean key, nothing forced
//   without a table, and where kind < 0: vertical_slash (1000, 6096)
//   calibrate: the candidate with the most true mass, averaged over query rows from 2500 on (of a shorter prompt: from
//   its middle on), wins. Every 16th row stands for all.
//     search = mass:     a_shape 100 : 800, vertical_slash 30 : 800, 100 : 750, 500 : 700, 3500 : 100, 1000 : 6096 and
//                        block_topk, each as large as `search_density` of the causal pairs allows in that head after
//                        lowering; sizes are averaged over the traces
//     search = original: a_shape (100, 800), vertical_slash (30, 800), (100, 750), (500, 700), (3500, 100) with 30
//                        offsets first, and an eighth of the 32-token blocks, as token masks; an a_shape winner is
//                        stored as vertical_slash (100, 800), a block winner as vertical_slash (1000, 6096)
#include <algorithm>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/pooled.hpp>
#include <lacuna/sdk/slash.hpp>

#include "pattern_search.hpp"

namespace {
using namespace lacuna::sdk;
using namespace minference;

constexpr i32 kColumns = 1000, kDiagonals = 6096;

/// The table on the device.
struct Patterns {
  const float* table;  // [heads, 3] or null
  i64 heads;

  LACUNA_HD Pattern of(i64 head) const {
    const float* row = table ? table + head % heads * 3 : nullptr;
    if (!row || row[0] < 0.f) return {kSlash, kColumns, kDiagonals};
    return {static_cast<i32>(row[0]), static_cast<i64>(row[1]), static_cast<i64>(row[2])};
  }
};

struct MInference : Strategy {
  struct Params {
    Data table;
    std::string search = "mass";
    double search_density = 0.2;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("table", &Params::table, "each layer's pattern [query heads, 3]; none: every head (1000, 6096)")
        .field("search", &Params::search, "calibration: candidates of equal cost, or the original's", "mass|original")
        .field("search_density", &Params::search_density, "calibration: share of the pairs of a candidate of mass",
               "0<..1");
  }
  static Info info() {
    Info i{};
    i.name = "minference";
    i.summary = "a pattern for each head: columns and diagonals, a window, or blocks";
    i.paper = "Jiang et al. 2024, arXiv 2407.02490";
    i.rule = "pattern[head] = vertical_slash | a_shape | block_topk with its sizes, by true mass on calibration traces";
    i.phases = kPrefill;
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.q_tile = p.unit_tokens = kTile;
    p.max_pieces = most_slash_pieces(p.max_cached, kTile, kTile);
    p.max_tokens = p.max_cached;
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    const i64 tiles = (p.max_cached + kTile - 1) / kTile, rows = params.table.given() ? heads * tiles : 0;
    p.workspace_bytes = 16 * (heads * p.max_cached + 256) + 8 * (heads * 4 + 256) + 4 * rows * (tiles + 3) + 4 * 256;
    p.workspace_bytes += pooled_dots_bytes(c, p.max_cached, kOriginalBlock, kOriginalBlock);  // the smallest blocks
  }

  Patterns patterns(Context& c) const {
    const Array a = c.data("table", "pattern");
    const i64 heads = c.layer().num_qo_heads;
    if (a.data && (a.rank != 2 || a.extent[0] != heads || a.extent[1] != 3))
      throw Failure("minference: the table's pattern must be [" + std::to_string(heads) + ", 3] in every layer");
    return {static_cast<const float*>(a.data), heads};
  }

  void mark(Context& c, const Budget& budget, Selection& out) override {
    const Patterns table = patterns(c);
    const SlashRanking r =
        rank_slashes(c, c.last_queries(kLastQueries), out.rows, Gqa::none, std::max(kForcedColumns, budget.sinks),
                     std::max(kForcedDiagonals, budget.recent));
    const Slashes chosen{r.heads,
                         r.length,
                         c.workspace<i32>(r.heads * r.length),
                         c.workspace<i32>(r.heads * r.length),
                         c.workspace<i32>(r.heads),
                         c.workspace<i32>(r.heads)};
    c.for_each(r.heads, [=] LACUNA_HD(i64 head) {
      const Pattern p = table.of(head);
      const i64 v = p.first > r.forced_columns ? p.first : r.forced_columns;
      const i64 s = p.second > kLeastDiagonals ? p.second : kLeastDiagonals;
      r.want(head, p.kind == kSlash ? v : 0, p.kind == kSlash ? s : 0);
    });
    choose_slashes(c, r, chosen);
    lower_slashes(c, out.rows, chosen, kTile, false, &out, nullptr);
    if (!table.table) return;
    const Rows rows = out.rows;
    i32 *sinks = out.exact_sinks, *window = out.exact_window;
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const Pattern p = table.of(row / rows.tiles);
      if (p.kind != kShape) return;
      sinks[row] = static_cast<i32>(p.first);
      window[row] = static_cast<i32>(p.second);
    });
    take_blocks(c, table, out);
  }

  /// Rows of block_topk heads; the pieces of the others stay.
  static void take_blocks(Context& c, const Patterns& table, Selection& out) {
    const Rows rows = out.rows;
    const i64 count = rows.count(), blocks = (c.kv().max_length + kTile - 1) / kTile, capacity = out.piece_capacity;
    float* score = c.workspace<float>(count * blocks);
    i32 *visible = c.workspace<i32>(count), *wanted = c.workspace<i32>(count), *taken = c.workspace<i32>(count);
    pooled_dots(c, rows, kTile, score, blocks);
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const Pattern p = table.of(row / rows.tiles);
      visible[row] = static_cast<i32>((rows.first_position + rows.query_end(row) + kTile - 1) / kTile);
      wanted[row] = p.kind == kBlocks ? static_cast<i32>(p.first < visible[row] ? p.first : visible[row]) : 0;
    });
    c.topk(score, static_cast<i32>(count), blocks, visible, wanted, out.pieces, taken, capacity);
    i32 *const pieces = out.pieces, *const piece_count = out.piece_count;
    c.for_each(count * capacity, [=] LACUNA_HD(i64 i) {
      const i64 row = i / capacity;
      if (i % capacity < taken[row]) pieces[i] *= kTile;
      if (i % capacity == 0 && taken[row] > 0) piece_count[row] = taken[row];
    });
  }

  void calibrate(Context& c, Calibration& to) override {
    const bool original = params.search == "original";
    const std::vector<Candidate> candidates = original ? original_candidates() : equal_cost_candidates();
    const i64 heads = c.layer().num_qo_heads, count = static_cast<i64>(candidates.size());
    double* sums = to.sums("candidates", heads * count * 3);  // mass, first and second size
    search_trace(c, candidates, original, params.search_density, sums);
    if (!to.last()) return;
    std::vector<float> pattern;
    for (i64 head = 0; head < heads; ++head) {
      const double* of = sums + head * count * 3;
      i64 best = 0;
      for (i64 i = 1; i < count; ++i)
        if (of[i * 3] > of[best * 3]) best = i;
      const i32 kind = candidates[static_cast<std::size_t>(best)].kind;
      const auto size = [&](i64 n) { return static_cast<float>(std::llround(of[best * 3 + n] / to.traces)); };
      if (original && kind == kBlocks)
        pattern.insert(pattern.end(), {kSlash, kColumns, kDiagonals});
      else
        pattern.insert(pattern.end(), {static_cast<float>(original ? kSlash : kind), size(1), size(2)});
    }
    const i64 extent[] = {heads, 3};
    to.put("pattern", pattern.data(), 2, extent);
  }
};
}  // namespace

LACUNA_PLUGIN(MInference)
