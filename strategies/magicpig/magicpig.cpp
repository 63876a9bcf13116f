// MagicPIG (Chen et al. 2024, "MagicPIG: LSH sampling for efficient LLM generation", arXiv 2410.16179)
//
//   once, at the end of the prompt:  centre = mean key of the middle tokens (not the sinks, not the last `recent`)
//   code_t(x) = signs of x . g_1 .. x . g_K, g Gaussian, for each of L tables;  keys are hashed as k - centre
//   per query head: a middle token is sampled if at least 2 tables agree with the query's codes;
//     p = (1 - angle(q, k - centre) / pi)^K,  w = 1 - (1 - p)^L - L p (1 - p)^(L - 1)      (its sampling probability)
//     and its logit becomes  q . k * scale - log(w + 1e-4)
//   sinks, the prompt's last `recent` tokens and every generated token are read exactly.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/prompt.hpp>
#include <lacuna/sdk/simhash.hpp>

namespace {
using namespace lacuna::sdk;

struct MagicPig : Strategy {
  struct Params {
    i32 bits = 10, tables = 150;
    i32 sinks = 4, recent = 64;
  } params;

  static void schema(Schema<Params>& s) {
    s.field("bits", &Params::bits, "hyperplanes of a table (K)", "1..16")
        .knob("tables", &Params::tables, "hash tables (L)", "2..4096")
        .field("sinks", &Params::sinks, "first tokens, read exactly", "0..1000000000")
        .field("recent", &Params::recent, "last tokens of the prompt, read exactly", "0..1000000000");
  }
  static Info info() {
    Info i{};
    i.name = "magicpig";
    i.summary = "tokens sampled by SimHash collisions, logits corrected by the sampling probability";
    i.paper = "Chen et al. 2024, arXiv 2410.16179";
    i.rule =
        "sampled if >= 2 of L K-bit codes agree, logit - log(w + 1e-4); sinks, last prompt tokens, generated ones "
        "exact";
    i.phases = kDecode;
    i.defaults = R"({"dense_layers": [0, 16, 32, 48, 64]})";
    i.dense_point = R"({"dense_layers": [], "recent": 1000000000})";
    i.stochastic = 1;
    i.takes_budget = 0;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const Layer& l = c.layer();
    const i64 rows = static_cast<i64>(c.call().num_seqs) * l.num_qo_heads;
    p.max_pieces = 0;
    p.weighted = 1;
    p.sides[p.num_sides++] = {"codes", SidePer::token, 1, Dtype::u16, params.tables, 1};
    p.states[p.num_states++] = {"planes", Dtype::f32, plane_elements(params.tables, l.head_dim)};
    p.states[p.num_states++] = {"centre", Dtype::f32, static_cast<i64>(l.num_kv_heads) * l.head_dim};
    p.states[p.num_states++] = {"fixed", Dtype::i32, 1};
    p.workspace_bytes = rows * (2 * params.tables + 4 * p.max_cached + 4) + 3 * 256;
  }

  void index(Context& c, const Dirty& dirty) override {
    const i64 prompt = prompt_end(c);
    const Paged kv = c.kv();
    const SimHashPlanes planes = planes_of(c);
    draw(c, planes, c.call().num_seqs);
    fix_centre(c, prompt);
    const auto codes = c.side<u16>("codes");
    const float* centre = c.state<float>("centre");
    const i32 kv_heads = c.layer().num_kv_heads;
    const i64 d = kv.head_dim, tables = params.tables, units = dirty.max_units;
    c.for_each(dirty.rows * units * tables, [=] LACUNA_HD(i64 i) {
      const i64 table = i % tables, row = i / tables / units, slot = dirty.begin[row] + i / tables % units;
      if (slot >= dirty.end[row] || kv.position_of(row, slot) >= prompt) return;  // generated: never looked up
      codes.at(row, slot, table) =
          planes.code(row / kv_heads, table, [=](i64 e) { return kv.key(row, slot, e) - centre[row * d + e]; });
    });
    const double keys = static_cast<double>(dirty.rows) * static_cast<double>(units);
    c.charge(keys * (size_of(kv.dtype) * d + 2.0 * tables), 2.0 * keys * tables * params.bits * d);
  }

  void mark(Context& c, const Budget&, Selection& s) override {
    const auto codes = c.side<u16>("codes");
    const SimHashPlanes planes = planes_of(c);
    const float* centre = c.state<float>("centre");
    const Queries q = c.current_queries();
    const Paged kv = c.kv();
    const Selection out = s;
    const Rows rows = s.rows;
    const i32 kv_heads = c.layer().num_kv_heads, bits = params.bits, recent = params.recent, sinks = params.sinks;
    const i64 d = q.head_dim, tables = params.tables, slots = kv.max_length, prompt = prompt_end(c);
    u16* wanted = c.workspace<u16>(rows.count() * tables);
    float* sampled = c.workspace<float>(rows.count() * slots);
    i32* end = c.workspace<i32>(rows.count());  // of the middle tokens
    c.for_each(rows.count() * tables, [=] LACUNA_HD(i64 i) {
      const i64 seq = rows.seq_of(i / tables), head = rows.head_of(i / tables);
      wanted[i] = planes.code(seq, i % tables, [=](i64 e) { return q.at(seq, head, 0, e); });
    });
    c.for_each(rows.count(), [=] LACUNA_HD(i64 row) {
      const i64 kv_row = rows.kv_row(row, kv_heads);
      const i32 last = kv.visible(kv_row, prompt - 1) - recent;
      end[row] = last > 0 ? last : 0;
      out.exact_sinks[row] = sinks;
      out.exact_window[row] = kv.length[kv_row] - end[row];
    });
    c.for_each(rows.count() * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, slot = i % slots;
      if (slot >= end[row]) return;
      const i32 hits = equal_words(wanted + row * tables, &codes.at(rows.kv_row(row, kv_heads), slot), tables);
      sampled[i] = slot >= sinks && hits >= 2 ? 1.f : -INFINITY;
    });
    c.topk(sampled, static_cast<i32>(rows.count()), slots, end, end, out.tokens, out.token_count, out.token_capacity);
    c.for_each(rows.count() * slots, [=] LACUNA_HD(i64 i) {
      const i64 row = i / slots, at = row * out.token_capacity + i % slots, kv_row = rows.kv_row(row, kv_heads);
      if (i % slots >= out.token_count[row]) return;
      double dot = 0, qq = 0, kk = 0;
      for (i64 e = 0; e < d; ++e) {
        const double x = q.at(rows.seq_of(row), rows.head_of(row), 0, e);
        const double y = kv.key(kv_row, out.tokens[at], e) - centre[kv_row * d + e];
        dot += x * y, qq += x * x, kk += y * y;
      }
      const double cosine = qq * kk > 0 ? fmin(1.0, fmax(-1.0, dot / sqrt(qq * kk))) : 0.0;
      const double p = pow(1.0 - acos(cosine) / 3.14159265358979323846, static_cast<double>(bits));
      const double miss = pow(1.0 - p, tables - 1.0), w = 1.0 - miss * (1.0 - p) - tables * p * miss;
      out.token_log_weight[at] = static_cast<float>(-log(w + 1e-4));
    });
    // Without the correction's own work: how many tokens it is for is known on the device only.
    const double compared = static_cast<double>(rows.count()) * static_cast<double>(slots * tables);
    c.charge(2.0 * compared / c.layer().group(), compared + 2.0 * rows.count() * tables * bits * d);
  }

  SimHashPlanes planes_of(Context& c) const {
    return {c.state<float>("planes"), params.tables, c.layer().head_dim, params.bits};
  }

  /// Fixes the centre on the first call with keys, for good.
  void fix_centre(Context& c, i64 prompt) const {
    float* centre = c.state<float>("centre");
    i32* fixed = c.state<i32>("fixed");
    const Paged kv = c.kv();
    const i32 kv_heads = c.layer().num_kv_heads, recent = params.recent, sinks = params.sinks;
    const i64 d = kv.head_dim, seqs = kv.rows / kv_heads;
    c.for_each(kv.rows * d, [=] LACUNA_HD(i64 i) {
      const i64 row = i / d, end = kv.visible(row, prompt - 1) - recent;
      if (fixed[row / kv_heads]) return;
      double sum = 0;
      for (i64 slot = sinks; slot < end; ++slot) sum += kv.key(row, slot, i % d);
      centre[i] = end > sinks ? static_cast<float>(sum / static_cast<double>(end - sinks)) : 0.f;
    });
    c.for_each(seqs, [=] LACUNA_HD(i64 seq) { fixed[seq] = kv.length[seq * kv_heads] > 0; });
  }
};
}  // namespace

LACUNA_PLUGIN(MagicPig)
