// LServe (Yang et al. 2025, "LServe: efficient long-sequence LLM serving with unified sparse attention", arXiv
// 2502.14866), its decode attention
//
//   m, M = element-wise min, max of the keys of a sub-page (a page has `sub_pages` of them)
//   score(page) = max over its sub-pages of sum_d max(q_d m_d, q_d M_d)                                  (unscaled)
//   the current page is always read and not ranked, inside the budget; the best pages fill the rest, at least 3 in all.
//   Scores are made when the cached length is a multiple of `reselect`, and at the first generated token; until the
//   next time pages are taken by them.
//   With a class table, a KV head that it does not name (a streaming head) reads only the first `sinks` and the last
//   `recent` tokens, whatever the budget. Without one every head ranks pages, which is the original's default.
//
// The original's streaming heads read whole pages: 2 of sinks and 5 recent ones, the current one included.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/head_set.hpp>
#include <lacuna/sdk/key_bounds.hpp>
#include <lacuna/sdk/prompt.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i64 kMinPages = 3;

struct LServe : Strategy {
  struct Params {
    i32 page_size = 64, sub_pages = 4;
    i32 reselect = 4;
    Classes classes;
    i32 sinks = 128, recent = 256;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("page_size", &Params::page_size, "tokens of a page", "1..4096")
        .field("sub_pages", &Params::sub_pages, "parts of a page that have bounds of their own", "1..4096")
        .field("reselect", &Params::reselect, "pages are scored when this divides the cached length", "1..4096")
        .field("classes", &Params::classes, "retrieval KV heads by layer: [layer.3] full = [0, 2]; none: all are")
        .field("sinks", &Params::sinks, "first tokens of a streaming head", "0..")
        .field("recent", &Params::recent, "last tokens of a streaming head", "1..")
        .require("page_size, sub_pages", "page_size is a multiple of sub_pages",
                 [](const Params& p) { return p.page_size % p.sub_pages == 0; })
        .require("page_size, reselect", "page_size is a multiple of reselect",
                 [](const Params& p) { return p.page_size % p.reselect == 0; });
  }
  static Info info() {
    Info i{};
    i.name = "lserve";
    i.summary = "pages ranked by the best of their sub-pages' bounds, reselected every few tokens";
    i.paper = "Yang et al. 2025, arXiv 2502.14866";
    i.rule =
        "score(page) = max over sub-pages of sum_d max(q_d m_d, q_d M_d), every `reselect` tokens; current page "
        "forced; heads outside the class table: sinks and window";
    i.phases = kDecode;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.cost =
        "every reselect steps: 2 d_h S sub_pages / page_size H_kv elements read, 4 d_h S sub_pages / page_size H FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    const i32 sub_page = params.page_size / params.sub_pages;
    max_pages = pages_of(p.max_cached);
    p.unit_tokens = params.page_size;
    p.max_tokens = 0;
    p.sides[p.num_sides++] = {"min", SidePer::unit, sub_page, Dtype::f32, l.head_dim, 0};
    p.sides[p.num_sides++] = {"max", SidePer::unit, sub_page, Dtype::f32, l.head_dim, 0};
    p.states[p.num_states++] = {"scores", Dtype::f32, l.num_qo_heads * max_pages};
    p.states[p.num_states++] = {"scored", Dtype::i32, 2 * static_cast<i64>(l.num_kv_heads)};
    p.workspace_bytes = 8 * static_cast<i64>(c.call().num_seqs) * l.num_qo_heads + 2 * 256;
  }

  void index(Context& c, const Dirty& dirty) override {
    bound_keys(c, dirty, c.side<float>("min"), c.side<float>("max"));
    const Paged kv = c.kv();
    const i64 d = kv.head_dim, sub_page = dirty.unit_tokens, units = dirty.max_units;
    const double keys = static_cast<double>(dirty.rows) * static_cast<double>(units * sub_page * d);
    c.charge(size_of(kv.dtype) * keys + 8.0 * keys / static_cast<double>(sub_page), 2.0 * keys);
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    if (!b.limited) throw Failure("lserve needs a budget: density, tokens or units");
    score_pages(c);
    const float* scores = c.state<float>("scores");
    const Paged kv = c.kv();
    const Selection out = s;
    const Rows rows = s.rows;
    const i64* target = b.tokens;
    const bool all_rank = params.classes.empty();
    const HeadSet named = heads_of_class(params.classes, c.layer());
    const i32 kv_heads = c.layer().num_kv_heads, sinks = params.sinks, recent = params.recent;
    const i64 page = params.page_size, stride = max_pages;
    i32 *ranked = c.workspace<i32>(rows.count()), *wanted = c.workspace<i32>(rows.count());
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 kv_row = rows.kv_row(row, kv_heads), length = kv.length[kv_row], current = (length - 1) / page;
      if (!all_rank && !named.contains(kv_row % kv_heads)) {
        out.exact_sinks[row] = sinks;
        out.exact_window[row] = recent;
      } else if (target[row] >= length) {
        out.full[row] = 1;
      } else {
        const i64 fitting = (target[row] - (length - current * page)) / page;
        ranked[row] = static_cast<i32>(current);
        wanted[row] = static_cast<i32>(fitting > kMinPages - 1 ? fitting : kMinPages - 1);
      }
    });
    c.topk(scores, static_cast<i32>(rows.count()), stride, ranked, wanted, out.pieces, out.piece_count,
           out.piece_capacity);
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      if (wanted[row] == 0) return;
      i32* const pieces = out.pieces + row * out.piece_capacity;
      for (i32 n = 0; n < out.piece_count[row]; ++n) pieces[n] *= static_cast<i32>(page);
      pieces[out.piece_count[row]++] = ranked[row] * static_cast<i32>(page);
    });
  }

  i64 max_pages = 0;  // of a head, fixed by plan()

  i64 pages_of(i64 tokens) const { return (tokens + params.page_size - 1) / params.page_size; }

  /// Brings the scores up to date where they are not those of the last length that asks for new ones.
  void score_pages(Context& c) const {
    const auto lo = c.side<float>("min"), hi = c.side<float>("max");
    const Paged kv = c.kv();
    const i64 length = c.current_queries().first_position + 1, prompt = prompt_end(c);
    const i64 multiple = length - length % params.reselect, at = multiple > prompt ? multiple : prompt + 1;
    const Queries q = c.last_queries(length - at + 1);
    float* scores = c.state<float>("scores");
    i32* scored = c.state<i32>("scored");  // of each KV head: the length that the scores are of, and what was cached
    const i64 d = q.head_dim, page = params.page_size, sub_pages = params.sub_pages, sub_page = page / sub_pages;
    const i64 kv_heads = c.layer().num_kv_heads, group = c.layer().group(), pages = pages_of(kv.max_length);
    const i64 stride = max_pages, since = length - at;
    c.for_each(q.seqs * q.heads * pages, [=] LACUNA_HD(i64 i) {
      const i64 unit = i % pages, head = i / pages, row = head / group;
      if (unit * page >= kv.length[row]) return;
      if (scored[2 * row] == at && scored[2 * row + 1] == kv.length[row] - since) return;
      float best = -INFINITY;
      for (i64 u = unit * sub_pages; u < (unit + 1) * sub_pages && u * sub_page < kv.length[row]; ++u) {
        const float bound = largest_product(q, head / q.heads, head % q.heads, lo, hi, row, u);
        best = bound > best ? bound : best;
      }
      scores[head * stride + unit] = best;
    });
    c.for_each(q.seqs * kv_heads, [=] LACUNA_HD(i64 row) {
      scored[2 * row] = static_cast<i32>(at);
      scored[2 * row + 1] = static_cast<i32>(kv.length[row] - since);
    });
    if (at != length) return;
    const double bounds = static_cast<double>(q.seqs * pages * sub_pages) * static_cast<double>(d);
    c.charge(8.0 * bounds * static_cast<double>(kv_heads), 4.0 * bounds * static_cast<double>(q.heads));
  }
};
}  // namespace

LACUNA_PLUGIN(LServe)
