// Eviction while decoding (kvpress DecodingPress)
//
//   after the prompt everything stays
//   every `interval` decode steps, the `target` tokens that the base ranks best stay, its forced ones first
//
// kvpress gives a base that looks at queries the last 256 hidden states at most; here it has the window it asks for,
// prompt queries included.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct Decoding : Strategy {
  struct Params {
    Base base{R"({"name": "snapkv"})"};
    i32 interval = 512;
    i64 target = 2048;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "the strategy that ranks the tokens")
        .field("interval", &Params::interval, "decode steps between two cuts", "1..")
        .field("target", &Params::target, "tokens of a KV head after a cut", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "decoding";
    i.summary = "another strategy's eviction down to a fixed size every few decode steps";
    i.paper = "-";
    i.rule = "nothing after the prompt; every interval steps keep the base's best target tokens";
    i.phases = kEvict;
    i.dense_point = R"({"target": 1000000000})";
    i.takes_budget = 0;
    i.wrapper = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.evict_every = params.interval;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    p.workspace_bytes = rows * p.max_cached * 4 + rows * 4 + 2 * 256;
  }

  void retain(Context& c, const Budget& b, Kept& kept) override {
    const Paged kv = c.kv();
    const i64 slots = kv.max_length, count = b.rows.count(), sinks = b.sinks, recent = b.recent;
    const bool prompt = c.prefill();
    const i32 target = static_cast<i32>(params.target < slots ? params.target : slots);
    Scores base{b.rows, c.workspace<float>(count * slots), slots, static_cast<i32>(slots), 1, target};
    if (!prompt) c.base_scores(base);
    float* value = base.value;
    i32* wanted = c.workspace<i32>(count);
    const float first = INFINITY;
    c.for_each(count * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots, length = kv.length[row];
      const bool all = prompt || length <= target;
      if (slot == 0) wanted[row] = all ? static_cast<i32>(length) : target;
      if (all || slot < sinks || slot >= length - recent) value[i] = first;
    });
    const Selection set = kept.set;
    c.topk(value, static_cast<i32>(count), slots, kv.length, wanted, set.tokens, set.token_count, set.token_capacity);
    c.charge(8.0 * count * slots, 0);
  }
};
}  // namespace

LACUNA_PLUGIN(Decoding)
