// StreamingLLM (Xiao et al. 2024, "Efficient streaming language models with attention sinks", arXiv 2309.17453)
//
//   with a target of K tokens, every query reads the first min(sinks, K) tokens and its own last K - sinks, itself
//   included, as an exact mask; eviction keeps the same set of the cached tokens.
// The original also rotates keys by cache slot: eviction with `positions = compacted`.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct StreamingLlm : Strategy {
  struct Params {
    i32 sinks = 4;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("sinks", &Params::sinks, "first tokens that are always read", "0..");
  }
  static Info info() {
    Info i{};
    i.name = "streaming_llm";
    i.summary = "attention sinks and the most recent tokens";
    i.paper = "Xiao et al. 2024, arXiv 2309.17453";
    i.rule = "the first min(sinks, K) tokens and the last K - sinks, the current one included";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.max_pieces = 0;
    if (c.call().purpose == Purpose::select) p.max_tokens = 0;  // exact sinks and window need no lists
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    require(b);
    const i64* target = b.tokens;
    i32 *sinks_of = s.exact_sinks, *window_of = s.exact_window;
    const i64 sinks = params.sinks;
    c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 tokens = target[row] > 1 ? target[row] : 1;  // a row reads something however small its target
      sinks_of[row] = static_cast<i32>(tokens < sinks ? tokens : sinks);
      window_of[row] = static_cast<i32>(tokens < sinks ? 0 : tokens - sinks);
    });
  }

  void retain(Context& c, const Budget& b, Kept& kept) override {
    require(b);
    const Selection set = kept.set;
    const Paged kv = c.kv();
    const i64* target = b.tokens;
    const i32 kv_heads = c.layer().num_kv_heads;
    const i64 slots = kv.max_length, sinks = params.sinks;
    c.for_each(set.rows.count() * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, n = i % slots;
      const i64 length = kv.length[set.rows.kv_row(row, kv_heads)];
      const i64 tokens = target[row] > 1 ? target[row] : 1, count = tokens < length ? tokens : length;
      if (n == 0) set.token_count[row] = static_cast<i32>(count);
      if (n < count) set.tokens[row * set.token_capacity + n] = static_cast<i32>(n < sinks ? n : length - count + n);
    });
  }

 private:
  static void require(const Budget& b) {
    if (!b.limited) throw Failure("streaming_llm has no size of its own: give it a budget (density, tokens or units)");
  }
};
}  // namespace

LACUNA_PLUGIN(StreamingLlm)
