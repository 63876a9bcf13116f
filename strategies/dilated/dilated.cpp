// Dilated (Jiang et al. 2024, "MInference 1.0", arXiv 2407.02490: a baseline of its code)
//
//   columns 0 .. columns - 1, and the diagonals query - key = 1, 1 + stride, 1 + 2 stride, ... below `span`, lowered
//   per tile of 64 queries to 64-token pieces and gathered columns as vertical_slash does by default.
// The lowering fills the gaps of every stride up to 64: what is read is a band. The original's second form, whose
// nearest 2048 diagonals are all there, differs from a narrower band in nothing else.
#include <algorithm>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/slash.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i32 kTile = 64;

struct Dilated : Strategy {
  struct Params {
    i32 columns = 1024, span = 8192, stride = 2;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("columns", &Params::columns, "leading columns that every query reads", "0..")
        .field("span", &Params::span, "diagonals are taken below this offset", "2..")
        .field("stride", &Params::stride, "from one diagonal to the next", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "dilated";
    i.summary = "the leading columns and every other diagonal of a band";
    i.paper = "Jiang et al. 2024, arXiv 2407.02490";
    i.rule = "columns j < columns and offsets 1, 1 + stride, ... < span, lowered to pieces and gathered columns";
    i.phases = kPrefill;
    i.presets = R"({"original": {}})";
    i.dense_point = R"({"span": 2147483647})";
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;  // all heads read alike
    p.q_tile = p.unit_tokens = kTile;
    p.max_pieces = most_slash_pieces(p.max_cached, kTile, kTile);
    p.max_tokens = std::min<i64>(params.columns, p.max_cached);
    const i64 heads = static_cast<i64>(c.call().num_seqs) * c.layer().num_kv_heads;
    p.workspace_bytes = 2 * (heads * p.max_cached * 4 + 256) + 2 * (heads * 4 + 256);
  }

  void mark(Context& c, const Budget&, Selection& out) override {
    const i64 heads = static_cast<i64>(out.rows.seqs) * out.rows.heads;
    const i64 length = out.rows.first_position + out.rows.num_queries, stride = params.stride;
    const Slashes lists{heads,
                        length,
                        c.workspace<i32>(heads * length),
                        c.workspace<i32>(heads * length),
                        c.workspace<i32>(heads),
                        c.workspace<i32>(heads)};
    const i32 columns = static_cast<i32>(std::min<i64>(params.columns, length));
    const i32 diagonals = static_cast<i32>((std::min<i64>(params.span, length + 1) - 2) / stride + 1);
    c.for_each(heads * length, [=] LACUNA_HD(i64 i) {
      const i64 head = i / length, at = i % length;
      if (at == 0) {
        lists.num_columns[head] = columns;
        lists.num_diagonals[head] = diagonals;
      }
      if (at < columns) lists.columns[i] = static_cast<i32>(at);
      if (at < diagonals) lists.diagonals[i] = static_cast<i32>(1 + at * stride);
    });
    c.charge(4. * static_cast<double>(heads) * (columns + diagonals), 0.);
    lower_slashes(c, out.rows, lists, kTile, false, &out, nullptr);
  }
};
}  // namespace

LACUNA_PLUGIN(Dilated)
