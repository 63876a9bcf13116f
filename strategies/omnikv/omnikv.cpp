// OmniKV (Hao et al. 2025, "OmniKV: dynamic context selection for efficient long-context LLMs", ICLR 2025)
//
//   at each step, layer by layer:
//     layers before the first of `filter_layers`: everything
//     a filter layer: everything, and of the prompt's tokens the floor(keep * prompt) with the largest
//       score(j) = max over all query heads of q . k_j are remembered, one set for the layer
//     the layer after a filter layer: everything
//     every other layer: the last filter layer's tokens, and every generated token
//
// Generated tokens come on top of `keep`; with a budget they are inside it. The filter layers are those published for
// Llama-3-8B. The authors let the layer after a filter layer run dense while the chosen tokens are fetched.
#include <algorithm>
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/carried_lists.hpp>

namespace {
using namespace lacuna::sdk;

struct OmniKv : Strategy {
  struct Params {
    Ints filter_layers{2, 8, 18};
    double keep = .067;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("filter_layers", &Params::filter_layers, "layers that choose for those after them", "0..")
        .field("keep", &Params::keep, "share of the prompt that is read (instead of a budget)", "0..1");
  }
  static Info info() {
    Info i{};
    i.name = "omnikv";
    i.summary = "a few layers choose one set of prompt tokens for all heads of the layers after them";
    i.paper = "Hao et al. 2025, ICLR";
    i.rule = "filter layers: top floor(keep prompt) by max over heads of q . k; later layers read these and new tokens";
    i.phases = kDecode;
    i.nested = 1;
    i.needs = kNeedsAllLayers;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    p.per_query_head = 0;
    p.max_pieces = 0;
    const i64 seqs = c.call().num_seqs, heads = c.layer().num_kv_heads;
    p.workspace_bytes = 4 * (seqs * heads * p.max_cached + 2 * seqs * p.max_cached + 3 * seqs) + 6 * 256;
  }

  void mark(Context& c, const Budget& b, Selection& s) override {
    const i64 prompt = c.call().prompt_tokens, seqs = c.call().num_seqs;
    const PositionLists lists = carried_lists(c, seqs, prompt);
    const auto is_filter = [&](i32 layer) {
      return std::find(params.filter_layers.begin(), params.filter_layers.end(), layer) != params.filter_layers.end();
    };
    const i32 layer = c.layer().index;
    const bool first =
        std::none_of(params.filter_layers.begin(), params.filter_layers.end(), [=](i32 l) { return l < layer; });
    if (is_filter(layer)) choose(c, b, lists);
    if (first || is_filter(layer) || is_filter(layer - 1)) {
      i32* full = s.full;
      c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) { full[row] = 1; });
      return;
    }
    const Rows rows = s.rows;
    write_lists(c, lists, s, c.workspace<i32>(rows.count() * prompt), prompt,
                [=] LACUNA_HD(i64 row) { return rows.seq_of(row); });
  }

  /// The prompt's best positions, one list for a sequence.
  void choose(Context& c, const Budget& b, const PositionLists& to) const {
    const Paged kv = c.kv();
    const Queries q = c.current_queries();
    const Rows rows = b.rows;
    const i64 n = kv.max_length, d = q.head_dim, group = c.layer().group(), heads = rows.heads, seqs = q.seqs;
    const i64 prompt = c.call().prompt_tokens, generated = q.first_position + 1 - prompt, count = rows.count();
    const i64 own = static_cast<i64>(params.keep * static_cast<double>(prompt) + 1e-9);
    const i32 limited = b.limited;
    const i64* target = b.tokens;
    float* of_head = c.workspace<float>(count * n);   // by slot
    float* best = c.workspace<float>(seqs * prompt);  // by position
    i32* list = c.workspace<i32>(seqs * prompt);
    i32 *candidates = c.workspace<i32>(seqs), *wanted = c.workspace<i32>(seqs), *taken = c.workspace<i32>(seqs);
    c.for_each(count * n, [=] LACUNA_HD(i64 i) {
      const i64 row = i / n, slot = i % n, head = row % heads;
      if (slot >= kv.length[row]) return;
      float most = -INFINITY;
      for (i64 g = head * group; g < (head + 1) * group; ++g) {
        float sum = 0.f;
        for (i64 e = 0; e < d; ++e) sum += q.at(row / heads, g, 0, e) * kv.key(row, slot, e);
        most = sum > most ? sum : most;
      }
      of_head[i] = most;
    });
    c.for_each(seqs * prompt, [=] LACUNA_HD(i64 i) {
      const i64 seq = i / prompt, position = i % prompt;
      best[i] = -INFINITY;
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) {
        const i32 slot = kv.visible(row, position) - 1;
        if (slot >= 0 && kv.position_of(row, slot) == position && of_head[row * n + slot] > best[i])
          best[i] = of_head[row * n + slot];
      }
    });
    c.for_each(seqs, [=] LACUNA_HD(i64 seq) {
      const i64 room = limited ? target[seq * heads] - generated : own;
      candidates[seq] = static_cast<i32>(prompt);
      wanted[seq] = static_cast<i32>(room < 0 ? 0 : room < prompt ? room : prompt);
    });
    c.topk(best, static_cast<i32>(seqs), prompt, candidates, wanted, list, taken, prompt);
    const PositionLists out = to;
    c.for_each(seqs * prompt, [=] LACUNA_HD(i64 i) {
      if (i % prompt == 0) out.filled[i / prompt] = taken[i / prompt] + 1;
      out.position[i] = list[i];
    });
    const double cells = static_cast<double>(count) * static_cast<double>(n * d);
    c.charge(cells * static_cast<double>(size_of(kv.dtype)), 2.0 * cells * static_cast<double>(group));
  }
};
}  // namespace

LACUNA_PLUGIN(OmniKv)
