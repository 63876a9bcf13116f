// Budgets from a table, per layer and KV head (LU-KV and other offline searches publish such tables).
//
//   the file holds for a layer `tokens` or `share`, one number per KV head: tokens to keep, or the share of the cached
//   ones
//   no budget:  a head's target is its tokens, or its share of the cached tokens; shares are rounded together: floor,
//               then the largest remainders up to round_half_up of the layer's sum; at least 1
//   a budget:   the layer's target is shared out in proportion to the numbers, by largest remainders
//   a layer that the file leaves out keeps its target, or everything
//
// Remainders that tie go to the lower head.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/share_out.hpp>

namespace {
using namespace lacuna::sdk;

struct BudgetTable : Strategy {
  struct Params {
    Data file;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("file", &Params::file, "numbers by layer and KV head: [layer.3] share = [0.5, 0.1], or tokens = [...]");
  }
  static Info info() {
    Info i{};
    i.name = "table";
    i.summary = "targets of layers and KV heads from a file";
    i.paper = "-";
    i.rule = "target of a head = tokens, or share of the cached ones; with a budget: in proportion to them";
    i.phases = kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.needs = kNeedsData;
    return i;
  }

  void allocate_rows(Context& c, const Scores*, Budget& b) override {
    const Array tokens = c.data("file", "tokens"), share = c.data("file", "share");
    const Array given = tokens.data ? tokens : share;
    if (!given.data) return;
    const i32 heads_kv = c.layer().num_kv_heads;
    if (given.rank != 1 || given.extent[0] != heads_kv)
      throw Failure("file: layer " + std::to_string(c.layer().index) + " gives " + std::to_string(given.extent[0]) +
                    " numbers, expected one for each of " + std::to_string(heads_kv) + " KV heads");
    const Rows rows = b.rows;
    const Paged kv = c.kv();
    const float* number = static_cast<const float*>(given.data);
    const bool absolute = tokens.data != nullptr, limited = b.limited != 0;
    i64 *target = b.tokens, *pairs = b.pairs;
    c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
      const i64 begin = seq * rows.heads, end = begin + rows.heads;
      const auto cached = [=](i64 row) { return static_cast<i64>(kv.length[rows.kv_row(row, heads_kv)]); };
      const auto weight = [=](i64 row) {
        const double given_here = static_cast<double>(number[rows.kv_row(row, heads_kv) % heads_kv]);
        const double x = given_here > 0 ? given_here : 0;
        const double n = static_cast<double>(cached(row)), wanted = absolute ? x : x * n;
        return limited ? x : wanted < n ? wanted : n;
      };
      i64 total = 0;
      double sum = 0;
      bool whole = limited;
      for (i64 row = begin; row < end; ++row) {
        total += target[row];
        sum += weight(row);
        whole = whole && target[row] >= cached(row);
      }
      if (whole) return;
      share_out(limited ? static_cast<double>(total) : sum, begin, rows.heads, 1, weight, cached, target);
      for (i64 row = begin; row < end; ++row) {
        if (target[row] < 1 && !limited) target[row] = 1;
        pairs[row] = target[row];
      }
    });
    b.limited = 1;
  }
};
}  // namespace

LACUNA_PLUGIN(BudgetTable)
