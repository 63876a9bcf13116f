// FINCH (Corallo and Papotti 2024, "FINCH: prompt-guided key-value cache compression", arXiv 2408.00167), as kvpress
// states it
//
//   A        = softmax of each of the question's queries over all keys up to its own
//   score(j) = mean over the question's queries i of position(i) A_i(j), then reduced over the GQA group
//   tokens from the question on are kept, inside the budget.
//   Cut before the question: as many last queries as it has stand in for it.
//
// The original also re-rotates what is kept: preset kvpress (positions = compacted).
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/gqa.hpp>

namespace {
using namespace lacuna::sdk;

struct Finch : Strategy {
  static Info info() {
    Info i{};
    i.name = "finch";
    i.summary = "tokens ranked by the question's attention";
    i.paper = "Corallo and Papotti 2024, arXiv 2408.00167";
    i.rule = "score(j) = mean over the question's queries i of position(i) softmax_i(j); the question kept";
    i.phases = kEvict;
    i.defaults = R"({"gqa": "mean"})";
    i.presets = R"({"kvpress": {"positions": "compacted"}})";
    i.dense_point = R"({"density": 1.0})";
    i.query_aware = 1;
    i.comparable_across_heads = 1;
    i.nested = 1;
    i.needs = kNeedsQuestion;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.score_kind = ScoreKind::logit;
    p.per_query_head = common.gqa == Gqa::union_;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.workspace_bytes = 3 * (rows * p.max_cached * 4 + 256);
  }

  void score(Context& c, Scores& s) override {
    const Rows rows = s.rows;
    const Paged kv = c.kv();
    const i64 seen = c.last_queries(1).first_position + 1, asked = c.call().question_tokens;
    const bool known = asked > 0 && seen > c.call().question_begin;
    const i64 stand_in = asked < 1 ? 1 : asked < seen ? asked : seen;
    const i64 begin = known ? c.call().question_begin : seen - stand_in;
    const Queries q = c.last_queries(seen - begin);
    const i64 count = rows.count(), n = kv.max_length, stride = s.stride, heads = static_cast<i64>(q.seqs) * q.heads;
    const i64 window = known && asked < q.count ? asked : q.count;

    float* row = c.workspace<float>(heads * n);
    float* mass = c.workspace<float>(heads * n);
    for (i64 i = 0; i < window; ++i) {
      Queries one = q;
      one.data = static_cast<const char*>(q.data) + i * q.row_stride * size_of(q.dtype);
      one.first_position += i;
      one.count = 1;
      c.window_mass(one, Reduce::sum, row, nullptr, n);
      const float weight = static_cast<float>(one.first_position) / static_cast<float>(window);
      c.for_each(heads * n, [=] LACUNA_HD(i64 at) { mass[at] += weight * row[at]; });
    }
    c.charge(12.0 * window * heads * n, 2.0 * window * heads * n);
    if (!rows.per_query_head) {
      float* reduced = c.workspace<float>(count * n);
      c.group_reduce(mass, reduced, n, n, reduce_of(common.gqa));
      mass = reduced;
    }
    const i32 heads_kv = c.layer().num_kv_heads;
    const float first = INFINITY;
    float* value = s.value;
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 r = i / n, slot = i % n, kv_row = rows.kv_row(r, heads_kv);
      if (slot >= kv.length[kv_row]) return;
      value[r * stride + slot] = kv.position_of(kv_row, slot) >= begin ? first : mass[i];
    });
    c.charge(8.0 * count * n, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(Finch)
