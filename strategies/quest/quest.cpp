// Quest (Tang et al. 2024, "Quest: query-aware sparsity for efficient long-context LLM inference", arXiv 2406.10774)
//
//   per page and channel:  m, M = min, max of the page's keys          (updated as tokens arrive)
//   score(page)          = sum_d max(q_d * m_d, q_d * M_d)             (an upper bound of q . k, unscaled)
//   the current page is always read and not ranked, inside the budget; the best pages fill the rest.
// Preset sparse_frontier has that study's layers and shared pages; the study reads the current page on top of the
// budget.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/key_bounds.hpp>

namespace {
using namespace lacuna::sdk;

struct Quest : Strategy {
  struct Params {
    i32 page_size = 16;
    i32 forced_recent_pages = 1;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("page_size", &Params::page_size, "tokens of a page", "1..4096")
        .field("forced_recent_pages", &Params::forced_recent_pages, "last pages that are always read", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "quest";
    i.summary = "pages ranked by an upper bound of the query-key product";
    i.paper = "Tang et al. 2024, arXiv 2406.10774";
    i.rule =
        "score(page) = sum_d max(q_d m_d, q_d M_d), m and M the page's element-wise min and max key; current page "
        "forced";
    i.phases = kDecode;
    i.defaults = R"({"dense_layers": [0, 1]})";
    i.presets = R"({"original": {}, "sparse_frontier": {"dense_layers": [], "gqa": "sum"}})";
    i.dense_point = R"({"dense_layers": [], "density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.unit_tokens = params.page_size;
    p.last_units = params.forced_recent_pages;
    p.score_kind = ScoreKind::rank;
    const i64 d = c.layer().head_dim;
    p.sides[p.num_sides++] = {"min", SidePer::unit, params.page_size, Dtype::f32, d, 0};
    p.sides[p.num_sides++] = {"max", SidePer::unit, params.page_size, Dtype::f32, d, 0};
  }

  void index(Context& c, const Dirty& dirty) override {
    bound_keys(c, dirty, c.side<float>("min"), c.side<float>("max"));
    const i64 d = c.kv().head_dim, page = params.page_size, units = dirty.max_units;
    c.charge(2.0 * dirty.rows * units * d * page, 2.0 * dirty.rows * units * d * page);
  }

  void score(Context& c, Scores& s) override {
    const auto lo = c.side<float>("min"), hi = c.side<float>("max");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const i32 heads_kv = c.layer().num_kv_heads;
    const i64 d = q.head_dim, page = params.page_size, units = s.units, stride = s.stride;
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units, kv_row = rows.kv_row(row, heads_kv);
      if (unit * page >= kv.length[kv_row]) return;
      value[row * stride + unit] = largest_product(q, rows.seq_of(row), rows.head_of(row), lo, hi, kv_row, unit);
    });
    c.charge(8.0 * rows.count() / c.layer().group() * units * d, 4.0 * rows.count() * units * d);
  }
};
}  // namespace

LACUNA_PLUGIN(Quest)
