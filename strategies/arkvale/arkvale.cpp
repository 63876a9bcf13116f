// ArkVale (Chen et al. 2024, "ArkVale: efficient generative LLM inference with recallable key-value eviction",
// NeurIPS 2024)
//
//   per page and channel:  centre = (min + max) / 2 of the page's keys,  spread = mean |key - centre|
//   score(page) = mean over all query heads of the layer of  q . centre + sum_d |q_d| * spread_d      (unscaled)
//   the first `sink_pages` and the last `recent_pages` (the current one included) are always read, inside the budget;
//   the best pages fill the rest: one page list for the whole layer.
//
// The original attends to all pages of a cache on the GPU, into which the best pages are recalled, so that what it
// reads depends on the path; here the best pages are read. gqa = max or sum reduces over the layer's heads instead of
// the mean.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/key_bounds.hpp>

namespace {
using namespace lacuna::sdk;

struct ArkVale : Strategy {
  struct Params {
    i32 page_size = 32;
    i32 sink_pages = 2, recent_pages = 2;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("page_size", &Params::page_size, "tokens of a page", "1..4096")
        .field("sink_pages", &Params::sink_pages, "first pages that are always read", "0..")
        .field("recent_pages", &Params::recent_pages, "last pages that are always read", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "arkvale";
    i.summary = "pages ranked by centre and spread of their keys, one list a layer";
    i.paper = "Chen et al. 2024, NeurIPS 2024";
    i.rule =
        "score(page) = mean over the layer's query heads of q . centre + sum_d |q_d| spread_d; 2 first and 2 last "
        "pages forced";
    i.phases = kDecode;
    i.defaults = R"({"gqa": "mean"})";
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.cost = "2 d_h S / page_size H_kv elements read, 5 d_h S / page_size H FLOPs";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    if (common.gqa == Gqa::none || common.gqa == Gqa::union_)
      throw Failure("arkvale has one page list a layer: gqa must be mean, max or sum");
    const Layer& l = c.layer();
    p.unit_tokens = params.page_size;
    p.first_units = params.sink_pages;
    p.last_units = params.recent_pages;
    p.score_kind = ScoreKind::rank;
    p.per_query_head = 0;
    p.sides[p.num_sides++] = {"centre", SidePer::unit, params.page_size, Dtype::f32, l.head_dim, 0};
    p.sides[p.num_sides++] = {"spread", SidePer::unit, params.page_size, Dtype::f32, l.head_dim, 0};
    const i64 pages = (p.max_cached + params.page_size - 1) / params.page_size;
    p.workspace_bytes = 4 * static_cast<i64>(c.call().num_seqs) * l.num_qo_heads * pages + 256;
  }

  void index(Context& c, const Dirty& dirty) override {
    const auto centre = c.side<float>("centre"), spread = c.side<float>("spread");
    const Paged kv = c.kv();
    const i64 d = kv.head_dim, page = params.page_size, units = dirty.max_units;
    c.for_each(dirty.rows * units * d, [=] LACUNA_HD(i64 i) {
      const i64 channel = i % d, row = i / d / units, unit = dirty.begin[row] + i / d % units;
      if (unit >= dirty.end[row]) return;
      const i64 begin = unit * page, end = unit_end(kv, row, unit, page);
      const KeyRange r = key_range(kv, row, begin, end, channel);
      const float middle = (r.lo + r.hi) / 2.f;
      float sum = 0.f;
      for (i64 t = begin; t < end; ++t) sum += fabsf(kv.key(row, t, channel) - middle);
      centre.at(row, unit, channel) = middle;
      spread.at(row, unit, channel) = sum / static_cast<float>(end - begin);
    });
    const double keys = static_cast<double>(dirty.rows) * static_cast<double>(units * page * d);
    c.charge(size_of(kv.dtype) * keys + 8.0 * keys / static_cast<double>(page), 5.0 * keys);
  }

  void score(Context& c, Scores& s) override {
    const auto centre = c.side<float>("centre"), spread = c.side<float>("spread");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Rows rows = s.rows;
    const Gqa reduce = common.gqa;
    const i64 d = q.head_dim, page = params.page_size, units = s.units, stride = s.stride, heads = q.heads,
              kv_heads = c.layer().num_kv_heads, group = c.layer().group();
    float* of_head = c.workspace<float>(q.seqs * heads * units);
    float* value = s.value;
    c.for_each(q.seqs * heads * units, [=] LACUNA_HD(i64 i) {
      const i64 unit = i % units, head = i / units % heads, seq = i / units / heads;
      const i64 row = seq * kv_heads + head / group;
      if (unit * page >= kv.length[row]) return;
      float sum = 0.f;
      for (i64 e = 0; e < d; ++e) {
        const float x = q.at(seq, head, 0, e);
        sum += x * centre.at(row, unit, e) + fabsf(x) * spread.at(row, unit, e);
      }
      of_head[i] = sum;
    });
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 unit = i % units, row = i / units, seq = rows.seq_of(row);
      if (unit * page >= kv.length[rows.kv_row(row, static_cast<i32>(kv_heads))]) return;
      double sum = 0, best = -INFINITY;
      i64 heads_there = 0;  // a KV head may hold fewer pages than another one
      for (i64 head = 0; head < heads; ++head) {
        if (unit * page >= kv.length[seq * kv_heads + head / group]) continue;
        const double x = of_head[(seq * heads + head) * units + unit];
        sum += x;
        best = x > best ? x : best;
        ++heads_there;
      }
      const double reduced = reduce == Gqa::max ? best : reduce == Gqa::sum ? sum : sum / heads_there;
      value[row * stride + unit] = static_cast<float>(reduced);
    });
    const double scored = static_cast<double>(q.seqs * units) * static_cast<double>(d);
    c.charge(8.0 * scored * static_cast<double>(kv_heads), 5.0 * scored * static_cast<double>(heads));
  }
};
}  // namespace

LACUNA_PLUGIN(ArkVale)
