// TidalDecode (Yang et al. 2024, "TidalDecode: fast and accurate LLM decoding with position persistent sparse
// attention", arXiv 2410.05076)
//
//   at each step, layer by layer:
//     layers before the first of `select_layers`: everything
//     a layer of `select_layers`: everything, and per query head the k tokens with the largest q . k are remembered
//     every other layer: the tokens that the last of these layers remembered
//
// Nothing is forced: the current token is among the k by its rank only. With a budget, k is the budget of the selecting
// layer. Positions are remembered, so that layers may have evicted different tokens before.
#include <algorithm>
#include <cmath>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/carried_lists.hpp>

namespace {
using namespace lacuna::sdk;

struct Tidal : Strategy {
  struct Params {
    Ints select_layers{2, 13};
    i32 k = 256;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("select_layers", &Params::select_layers, "layers that read everything and choose for those after them",
            "0..")
        .field("k", &Params::k, "tokens that a selecting layer remembers (instead of a budget)", "1..");
  }
  static Info info() {
    Info i{};
    i.name = "tidal";
    i.summary = "a few layers choose the top tokens that the layers after them read";
    i.paper = "Yang et al. 2024, arXiv 2410.05076";
    i.rule = "selecting layers: everything, and top k by q . k; others: the last selecting layer's tokens";
    i.phases = kDecode;
    i.nested = 1;
    i.needs = kNeedsAllLayers;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 1;
    p.max_pieces = 0;
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.workspace_bytes = 8 * rows * p.max_cached + 12 * rows + 5 * 256;
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    const i64 length = c.last_queries(1).first_position + 1, rows = s.rows.count();
    const bool limited = b.limited != 0;
    const double wanted = b.density > 0 ? std::floor(b.density * static_cast<double>(length) + .5) : 0;
    const i64 most = !limited ? params.k : wanted > 0 ? static_cast<i64>(wanted) : length;
    const PositionLists lists = carried_lists(c, rows, std::clamp<i64>(most, 1, length));
    const auto& selecting = params.select_layers;
    if (std::find(selecting.begin(), selecting.end(), c.layer().index) != selecting.end()) {
      choose(c, b, lists);
      read_everything(c, s);
    } else if (std::none_of(selecting.begin(), selecting.end(), [&](i32 l) { return l < c.layer().index; })) {
      read_everything(c, s);
    } else {
      write_lists(c, lists, s, c.workspace<i32>(rows * lists.stride), length, [=] LACUNA_HD(i64 row) { return row; });
    }
  }

  void read_everything(Context& c, Selection& s) const {
    i32* full = s.full;
    c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) { full[row] = 1; });
  }

  /// The tokens with the largest logits of each query head.
  void choose(Context& c, const Budget& b, const PositionLists& to) const {
    const Paged kv = c.kv();
    const Queries q = c.current_queries();
    const Rows rows = b.rows;
    const i64 n = kv.max_length, d = q.head_dim, k = params.k, capacity = to.stride;
    const i32 heads_kv = c.layer().num_kv_heads, count = static_cast<i32>(rows.count()), limited = b.limited;
    const i64* target = b.tokens;
    float* logit = c.workspace<float>(count * n);
    i32* list = c.workspace<i32>(count * capacity);
    i32 *candidates = c.workspace<i32>(count), *wanted = c.workspace<i32>(count), *taken = c.workspace<i32>(count);
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, kv_row = rows.kv_row(row, heads_kv);
      if (slot >= kv.length[kv_row]) return;
      float sum = 0.f;
      for (i64 e = 0; e < d; ++e) sum += q.at(rows.seq_of(row), rows.head_of(row), 0, e) * kv.key(kv_row, slot, e);
      logit[i] = sum;
    });
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 most = limited ? target[row] : k;
      candidates[row] = kv.length[rows.kv_row(row, heads_kv)];
      wanted[row] = static_cast<i32>(most < capacity ? most : capacity);
    });
    c.topk(logit, count, n, candidates, wanted, list, taken, capacity);
    store_slots(c, to, count, taken, list, capacity, [=] LACUNA_HD(i64 row) { return rows.kv_row(row, heads_kv); });
    const double cells = static_cast<double>(count) * static_cast<double>(n * d);
    c.charge(cells / c.layer().group() * static_cast<double>(size_of(kv.dtype)), 2.0 * cells);
  }
};
}  // namespace

LACUNA_PLUGIN(Tidal)
