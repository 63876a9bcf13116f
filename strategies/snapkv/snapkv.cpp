// SnapKV (Li et al. 2024, "SnapKV: LLM knows what you are looking for before generation", arXiv 2404.14469)
//
//   A        = softmax of the last `window` queries over all keys (causal inside the window)
//   s(j)     = sum (or max) of A over the window's queries, then reduced over the GQA group
//   score(j) = 1-D pooling of s over positions: of the columns before the window only, which then drop the window
//              (`pool_columns = prefix`), or of all columns (`all`)
//   the last `recent` tokens (default: the window) and `sinks` are kept, inside the budget; the best fill the rest.
//
// The group is reduced before pooling: max-pool and mean do not commute. The original copies the cache to one head per
// query head and ranks each; gqa = union comes nearest.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct SnapKv : Strategy {
  struct Params {
    i32 window = 32, kernel = 7, recent = -1;
    std::string pool = "max", reduce = "sum", pool_columns = "prefix";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("window", &Params::window, "last queries that vote", "1..")
        .field("kernel", &Params::kernel, "width of the pooling", "1..")
        .field("pool", &Params::pool, "pooling over positions; avg counts zero padding", "max|avg")
        .field("recent", &Params::recent, "last tokens kept, inside the budget; -1: the window", "-1..")
        .field("reduce", &Params::reduce, "over the window's queries", "sum|max")
        .field("pool_columns", &Params::pool_columns, "columns that are pooled and ranked", "prefix|all")
        .require("kernel", "kernel is odd", [](const Params& p) { return p.kernel % 2 == 1; });
  }
  static Info info() {
    Info i{};
    i.name = "snapkv";
    i.summary = "tokens ranked by the pooled attention of the last queries";
    i.paper = "Li et al. 2024, arXiv 2404.14469";
    i.rule = "score(j) = pool(reduce over the group(sum over the window's queries of softmax)); window kept";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"longbench": {}, "kvpress": {"window": 64, "kernel": 5, "pool": "avg"},
      "sparse_frontier": {"window": 256, "kernel": 21, "pool": "avg", "pool_columns": "all", "recent": 128,
                          "sinks": 4}})";
    i.dense_point = R"({"density": 1.0})";
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = common.gqa == Gqa::union_;
    p.recent = params.recent < 0 ? params.window : params.recent;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.workspace_bytes = 3 * (rows * p.max_cached * 4 + 256) + rows * 4 + 256;
  }

  void score(Context& c, Scores& s) override {
    const Rows rows = s.rows;
    const Paged kv = c.kv();
    const Queries q = c.last_queries(params.window);
    const i32 heads_kv = c.layer().num_kv_heads, n = kv.max_length;
    const i64 count = rows.count(), stride = s.stride, window_begin = q.first_position;

    float* mass = c.workspace<float>(static_cast<i64>(q.seqs) * q.heads * n);
    c.window_mass(q, params.reduce == "sum" ? Reduce::sum : Reduce::max, mass, nullptr, n);
    if (!rows.per_query_head) {
      float* reduced = c.workspace<float>(count * n);
      const Gqa g = common.gqa;
      c.group_reduce(mass, reduced, n, n, g == Gqa::max ? Reduce::max : g == Gqa::sum ? Reduce::sum : Reduce::mean);
      mass = reduced;
    }

    i32* candidates = c.workspace<i32>(count);
    const bool all = params.pool_columns == "all";
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 kv_row = rows.kv_row(row, heads_kv);
      candidates[row] = all ? kv.length[kv_row] : kv.visible(kv_row, window_begin - 1);
    });
    float* pooled = c.workspace<float>(count * n);
    c.pool(mass, pooled, static_cast<i32>(count), candidates, n, params.kernel,
           params.pool == "max" ? Reduce::max : Reduce::mean);
    float* value = s.value;
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n;
      if (slot < candidates[row]) value[row * stride + slot] = pooled[i];
    });
    c.charge(8.0 * count * n, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(SnapKv)
