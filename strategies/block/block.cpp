// Iterative eviction by blocks (kvpress BlockPress; the procedure of KeyDiff, Park et al. 2025, arXiv 2504.15364)
//
//   kept = the first n tokens                                                    (n: the budget)
//   for every following block of `block` tokens:
//     kept = the n of kept + block that the base ranks best when only they are cached
//
// The base sees no query after the block's end, and forces its tokens within kept + block. Scores are those of the last
// round; a token that went in an earlier one is no candidate, so that beside an allocator a head gets n at most. One
// cut, after the prompt.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Block : Strategy {
  struct Params {
    Base base{R"({"name": "snapkv"})"};
    i32 block = 128;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that ranks the tokens")
        .field("block", &Params::block, "tokens that join the kept ones at a time", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "block";
    i.summary = "another strategy's eviction, block after block of the prompt";
    i.paper = "Park et al. 2025, arXiv 2504.15364";
    i.rule = "kept = first n; for each block: kept = the base's best n of kept + block";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.evict_every = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    p.workspace_bytes = rows * (3 * p.max_cached + params.block) * 4 + rows * 12 + 6 * 256;
  }

  void score(Context& c, Scores& s) override {
    if (s.budget_tokens < 0) throw Failure("block has no size of its own: give it a budget");
    const Paged kv = c.kv();
    const i64 slots = kv.max_length, count = s.rows.count(), n = s.budget_tokens > 1 ? s.budget_tokens : 1;
    if (n >= slots) {
      c.base_scores(s);
      return;
    }
    const i64 block = params.block, stride = n + block;
    const i64 gone = c.last_queries(1).first_position + 1 - slots;  // tokens that an earlier cut took
    Scores round = s;
    round.stride = slots;
    round.value = c.workspace<float>(count * slots);
    i32 *held = c.workspace<i32>(count * stride), *held_count = c.workspace<i32>(count);
    i32 *best = c.workspace<i32>(count * n), *best_count = c.workspace<i32>(count), *wanted = c.workspace<i32>(count);
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, length = kv.length[row], size = length < n ? length : n;
      best[i] = static_cast<i32>(i % n);
      if (i % n == 0) best_count[row] = wanted[row] = static_cast<i32>(size);
    });
    for (i64 begin = n; begin < slots; begin += block) {
      const i64 end = begin + block < slots ? begin + block : slots;
      c.for_each(count * stride, [=] LACUNA_HD(i64 i) {
        const i64 row = i / stride, place = i % stride, kept = best_count[row], length = kv.length[row];
        const i64 last = end < length ? end : length, joining = last > begin ? last - begin : 0;
        if (place == 0) held_count[row] = static_cast<i32>(kept + joining);
        if (place < kept + joining)
          held[i] = place < kept ? best[row * n + place] : static_cast<i32>(begin + place - kept);
      });
      c.base_scores_of({held_count, held, stride, end + gone}, round);
      c.topk(round.value, static_cast<i32>(count), slots, kv.length, wanted, best, best_count, n);
    }
    float* value = s.value;
    const float* last = round.value;
    const i64 out_stride = s.stride;
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n;
      if (i % n < best_count[row]) value[row * out_stride + best[i]] = last[row * slots + best[i]];
    });
    const double rounds = static_cast<double>((slots - n + block - 1) / block);
    c.charge(rounds * 8.0 * static_cast<double>(count * stride), 0);
  }
};
}  // namespace

LACUNA_PLUGIN(Block)
