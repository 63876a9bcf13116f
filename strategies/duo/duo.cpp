// DuoAttention (Xiao et al. 2024, "DuoAttention: efficient long-context LLM inference with retrieval and streaming
// heads", arXiv 2410.10819)
//
//   a KV head that the class table names for this layer (a retrieval head) reads and keeps everything;
//   every other one (a streaming head) only the first `sinks` and the last `recent` tokens, the newest included.
//
// 128 + 256 is what the published class tables were trained with; the authors deploy with 64 + 256.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/head_set.hpp>

namespace {
using namespace lacuna::sdk;

struct Duo : Strategy {
  struct Params {
    Classes classes;
    i32 sinks = 128, recent = 256;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("classes", &Params::classes, "retrieval KV heads by layer: [layer.3] full = [0, 2]")
        .field("sinks", &Params::sinks, "first tokens of a streaming head", "0..")
        .field("recent", &Params::recent, "last tokens of a streaming head", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "duo";
    i.summary = "retrieval heads read everything, streaming heads sinks and a window";
    i.paper = "Xiao et al. 2024, arXiv 2410.10819";
    i.rule = "heads named by the class table: full; the others: first `sinks` and last `recent` tokens";
    i.phases = kPrefill | kDecode | kEvict;
    i.presets = R"({"original": {}, "deploy": {"sinks": 64}})";
    i.dense_point = R"({"recent": 1000000000})";
    i.takes_budget = 0;
    return i;
  }

  void allocate_rows(Context& c, const Scores*, Budget& b) override {
    const i32 heads_kv = c.layer().num_kv_heads, sinks = params.sinks, recent = params.recent;
    const HeadSet full = heads_of_class(params.classes, c.layer());
    const Rows rows = b.rows;
    i32 *rule = b.rule, *window_sinks = b.window_sinks, *window_recent = b.window_recent;
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const bool retrieval = full.contains(rows.kv_row(row, heads_kv) % heads_kv);
      rule[row] = static_cast<i32>(retrieval ? Rule::full : Rule::window);
      window_sinks[row] = sinks;
      window_recent[row] = recent;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(Duo)
