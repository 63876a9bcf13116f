// Chunked eviction (kvpress ChunkPress)
//
//   cut the prompt into chunks of `chunk` tokens (the last one may be shorter)
//   each chunk keeps max(1, int(its tokens * kept share)) of its own: those that the base ranks best when only the
//   chunk is cached and no later query exists; kept share = target / cached
//
// Counts truncate chunk by chunk, as there, so that a head may keep a few tokens less than the target. What the base
// forces (sinks, recent) it forces in every chunk. One cut, after the prompt.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Chunk : Strategy {
  struct Params {
    Base base{R"({"name": "snapkv"})"};
    i32 chunk = 1024;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that ranks the tokens of a chunk")
        .field("chunk", &Params::chunk, "tokens that are cut on their own", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "chunk";
    i.summary = "another strategy's eviction, each chunk of the prompt on its own";
    i.paper = "-";
    i.rule = "each chunk keeps its max(1, int(tokens * kept share)) best by the base's scores of the chunk alone";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.evict_every = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    const i64 chunk = params.chunk < p.max_cached ? params.chunk : p.max_cached;
    p.workspace_bytes = rows * 2 * (p.max_cached + chunk) * 4 + rows * 12 + 7 * 256;
  }

  void retain(Context& c, const Budget& b, Kept& kept) override {
    if (!b.limited) throw Failure("chunk has no size of its own: give it a budget (density, tokens or units)");
    const Paged kv = c.kv();
    const i64 slots = kv.max_length, count = b.rows.count(), sinks = b.sinks, recent = b.recent;
    const i64 chunk = params.chunk < slots ? params.chunk : slots;
    const i64 gone = c.last_queries(1).first_position + 1 - slots;  // tokens that an earlier cut took
    const i64* target = b.tokens;
    float *scores = c.workspace<float>(count * slots), *keep = c.workspace<float>(count * slots);
    i32 *held = c.workspace<i32>(count * chunk), *best = c.workspace<i32>(count * chunk);
    i32 *held_count = c.workspace<i32>(count), *best_count = c.workspace<i32>(count), *wanted = c.workspace<i32>(count);
    const float never = -INFINITY;
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 slot = i % slots;
      keep[i] = slot < sinks || slot >= kv.length[i / slots] - recent ? 1.f : never;
    });
    for (i64 begin = 0; begin < slots; begin += chunk) {
      const i64 end = begin + chunk < slots ? begin + chunk : slots;
      c.for_each(count * chunk, [=] LACUNA_HD(i64 i) {
        const i64 row = i / chunk, place = i % chunk, length = kv.length[row], last = end < length ? end : length;
        held[i] = static_cast<i32>(begin + place);
        if (place > 0) return;
        const i64 own = (last - begin) * target[row] / length;
        held_count[row] = static_cast<i32>(last - begin);
        wanted[row] = static_cast<i32>(own > 1 ? own : 1);
      });
      const i64 mean = (end - begin) * b.mean_tokens / slots;
      Scores of_chunk{b.rows, scores, slots, static_cast<i32>(slots), 1, mean > 1 ? mean : 1};
      c.base_scores_of({held_count, held, chunk, end + gone}, of_chunk);
      c.topk(scores, static_cast<i32>(count), slots, kv.length, wanted, best, best_count, chunk);
      c.for_each(count * chunk, [=] LACUNA_HD(i64 i) {
        const i64 row = i / chunk;
        if (i % chunk < best_count[row]) keep[row * slots + best[i]] = 1.f;
      });
    }
    const Selection set = kept.set;
    c.topk(keep, static_cast<i32>(count), slots, kv.length, kv.length, set.tokens, set.token_count,
           set.token_capacity);  // in order; as many as there are
    c.charge(20.0 * count * slots, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(Chunk)
