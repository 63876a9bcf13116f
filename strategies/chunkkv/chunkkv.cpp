// ChunkKV (Liu et al. 2025, "ChunkKV: semantic-preserving KV cache compression for efficient long-context LLM
// inference", arXiv 2502.00299)
//
//   s(j)   = the base's scores, summed over the KV heads of the layer; its forced tokens +inf
//   s(u)   = mean of s over the tokens of chunk u (the last one may be shorter)
//   kept   = max(1, int(chunks * kept share)) best chunks, the same for every head; kept share = target / cached
//   a prompt shorter than a chunk: the base's own best tokens
//
// Counts are chunks, as in kvpress' ChunkKVPress, so that a head keeps the target up to a chunk. The paper's reuse of
// chunks by later layers is absent there and here. One cut, after the prompt.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct ChunkKv : Strategy {
  struct Params {
    Base base{R"({"name": "snapkv"})"};
    i32 chunk = 20;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that scores the tokens")
        .field("chunk", &Params::chunk, "consecutive tokens that are kept or dropped together", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "chunkkv";
    i.summary = "chunks ranked by another strategy's mean score, the same for every head";
    i.paper = "Liu et al. 2025, arXiv 2502.00299";
    i.rule = "s(chunk) = mean over its tokens of the base's scores summed over KV heads; the best chunks are kept";
    i.phases = kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.unit_tokens = params.chunk;
    p.evict_every = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    const i64 chunks = (p.max_cached + params.chunk - 1) / params.chunk;
    p.workspace_bytes = 2 * rows * p.max_cached * 4 + rows * (2 * chunks * 4 + 16) + 8 * 256;
  }

  void retain(Context& c, const Budget& b, Kept& kept) override {
    if (!b.limited) throw Failure("chunkkv has no size of its own: give it a budget (density, tokens or units)");
    const Paged kv = c.kv();
    const i64 slots = kv.max_length, count = b.rows.count();
    Scores base{b.rows, c.workspace<float>(count * slots), slots, static_cast<i32>(slots), 1, b.mean_tokens};
    c.base_scores(base);
    const Selection set = kept.set;
    const i64* target = b.tokens;
    i32* wanted = c.workspace<i32>(count);
    if (slots < params.chunk) {
      c.for_each(count, [=] LACUNA_HD(i64 row) { wanted[row] = target[row] > 1 ? static_cast<i32>(target[row]) : 1; });
      c.topk(base.value, static_cast<i32>(count), slots, kv.length, wanted, set.tokens, set.token_count,
             set.token_capacity);
      return;
    }
    const float* chosen = choose_chunks(c, b, base.value);
    const i64 chunk = params.chunk, heads = b.rows.heads, chunks = (slots + chunk - 1) / chunk;
    float* keep = c.workspace<float>(count * slots);
    const float never = -INFINITY;
    const i64 sinks = b.sinks, recent = b.recent;
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots, length = kv.length[row];
      const bool forced = slot < sinks || slot >= length - recent;
      keep[i] = forced || chosen[row / heads * chunks + slot / chunk] > 0.f ? 1.f : never;
    });
    c.topk(keep, static_cast<i32>(count), slots, kv.length, kv.length, set.tokens, set.token_count,
           set.token_capacity);  // in order; as many as there are
    c.charge(12.0 * count * slots, 1.0 * count * slots);
  }

  /// [seqs, chunks] 1: kept.
  float* choose_chunks(Context& c, const Budget& b, const float* scores) {
    const Paged kv = c.kv();
    const i64 chunk = params.chunk, slots = kv.max_length, chunks = (slots + chunk - 1) / chunk;
    const i64 heads = b.rows.heads, sinks = b.sinks, recent = b.recent;
    const i32 seqs = b.rows.seqs;
    const i64* target = b.tokens;
    const float first = INFINITY;
    float *mean = c.workspace<float>(seqs * chunks), *chosen = c.workspace<float>(seqs * chunks);
    i32 *best = c.workspace<i32>(seqs * chunks), *size = c.workspace<i32>(seqs);
    i32 *all = c.workspace<i32>(seqs), *wanted = c.workspace<i32>(seqs);
    c.for_each(seqs * chunks, [=] LACUNA_HD(i64 i) {
      constexpr double kLeast = -1e30;  // of a token that the base never takes: its chunk comes last, not out
      const i64 seq = i / chunks, begin = i % chunks * chunk, end = begin + chunk < slots ? begin + chunk : slots;
      double sum = 0;
      bool taken = false;
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row)
        for (i64 slot = begin; slot < end && slot < kv.length[row]; ++slot) {
          const float s = scores[row * slots + slot];
          taken = taken || s == first || slot < sinks || slot >= kv.length[row] - recent;
          sum += s > kLeast ? static_cast<double>(s) : kLeast;
        }
      mean[i] = taken ? first : static_cast<float>(sum / static_cast<double>(end - begin));
    });
    c.for_each(seqs, [=] LACUNA_HD(i64 seq) {
      i64 tokens = 0, cached = 0;
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) {
        tokens += target[row];
        cached += kv.length[row];
      }
      const i64 n = chunks * tokens / cached;
      wanted[seq] = static_cast<i32>(n > 1 ? n : 1);
      all[seq] = static_cast<i32>(chunks);
    });
    c.topk(mean, seqs, chunks, all, wanted, best, size, chunks);
    c.for_each(seqs * chunks, [=] LACUNA_HD(i64 i) {
      const i64 seq = i / chunks;
      if (i % chunks < size[seq]) chosen[seq * chunks + best[i]] = 1.f;
    });
    return chosen;
  }
};
}  // namespace

LACUNA_PLUGIN(ChunkKv)
