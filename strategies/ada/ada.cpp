// Ada-KV (Feng et al. 2024, "Ada-KV: optimizing KV cache eviction by adaptive budget allocation for efficient LLM
// inference", arXiv 2407.11550): the heads of a layer share its budget by the size of their scores.
//
//   n = target of a head, H = heads, f = floor
//   guarantee (kvpress, Sparse Frontier): every head keeps its own best floor(f n); the layer's best others fill the
//     rest, until n H are kept
//   blend (the authors' code): c = a head's tokens among the layer's best n H;
//     target = round_half_even((1 - f) c + floor(f n)), and where rounding takes a layer over n H, the largest gains go
//   forced = compete: sinks and recent tokens rank first, inside n; outside: n is what they leave, and they come on top
//
// Only counts are decided here: a head then takes its own best. Ties go to the lower head, then to the lower position.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/compete.hpp>

namespace {
using namespace lacuna::sdk;

struct Ada : Strategy {
  struct Params {
    double floor = .2;
    std::string floor_mode = "guarantee", forced = "compete";
  } params;

  static void schema(Schema<Params>& s) {
    s.field("floor", &Params::floor, "share of the uniform budget that every head keeps", "0..1")
        .field("floor_mode", &Params::floor_mode, "a least count, or a mix with the uniform budget", "guarantee|blend")
        .field("forced", &Params::forced, "forced tokens inside the competition or beside it", "compete|outside");
  }
  static Info info() {
    Info i{};
    i.name = "ada";
    i.summary = "the heads of a layer share its budget by a common ranking of their scores";
    i.paper = "Feng et al. 2024, arXiv 2407.11550";
    i.rule = "each head its own best floor(f n), then the best of the layer's rest until n H are kept";
    i.phases = kDecode | kEvict;
    i.presets = R"({"kvpress": {}, "original": {"floor_mode": "blend", "forced": "outside"}})";
    i.dense_point = R"({"density": 1.0})";
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const i64 rows = static_cast<i64>(c.call().num_seqs) * c.layer().num_qo_heads;
    p.workspace_bytes = 2 * (rows * p.max_cached * 4 + 256) + 8 * (rows * 4 + 256);
  }

  void allocate_rows(Context& c, const Scores* scores, Budget& b) override {
    if (!scores || !b.limited) return;  // nothing to compare, or nothing to share
    const Rows rows = b.rows;
    const Paged kv = c.kv();
    const i32 heads_kv = c.layer().num_kv_heads, count = static_cast<i32>(rows.count());
    const i64 heads = rows.heads, units = scores->units, unit = scores->unit_tokens, stride = scores->stride;
    const ForcedUnits is_forced{unit, b.sinks, b.recent};
    const bool outside = params.forced == "outside", blend = params.floor_mode == "blend";
    const double share = params.floor;
    const float first = INFINITY;
    const float* value = scores->value;
    i64 *tokens = b.tokens, *pairs = b.pairs;

    float* ranked = c.workspace<float>(count * units);  // what competes
    i32* list = c.workspace<i32>(count * units);
    i32* forced = c.workspace<i32>(count);  // units beside the competition
    i32* free = c.workspace<i32>(count);    // units of the row's target that compete
    i32* least = c.workspace<i32>(count);
    i32* candidates = c.workspace<i32>(count);
    i32* taken = c.workspace<i32>(count);
    c.for_each(count * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, u = i % units, length = kv.length[rows.kv_row(row, heads_kv)];
      const float v = value[row * stride + u];
      if (u * unit >= length)
        ranked[i] = -first;
      else
        ranked[i] = !is_forced.hold(u, length, v) ? v : outside ? -first : first;
    });
    c.for_each(count, [=] LACUNA_HD(i64 row) {
      const i64 length = kv.length[rows.kv_row(row, heads_kv)], target = tokens[row] / unit;
      i64 beside = 0;
      for (i64 u = 0; outside && u * unit < length; ++u) beside += is_forced.hold(u, length, value[row * stride + u]);
      forced[row] = static_cast<i32>(beside < target ? beside : target);
      free[row] = static_cast<i32>(target - forced[row]);
      least[row] = static_cast<i32>(share * free[row] + 1e-9);
      candidates[row] = static_cast<i32>(units);
    });
    if (!blend) {
      c.topk(ranked, count, units, candidates, least, list, taken, units);
      c.for_each(count, [=] LACUNA_HD(i64 row) {
        for (i64 i = 0; i < taken[row]; ++i) ranked[row * units + list[row * units + i]] = -first;
      });
    }

    i32* wanted = c.workspace<i32>(rows.seqs);
    c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) wanted[seq] += free[row] - taken[row];
    });
    compete(c, rows, ranked, units, wanted, list, taken);

    c.for_each(rows.seqs, [=] LACUNA_HD(i64 seq) {
      bool all = true;  // whole units could not say that every head keeps all it has
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row)
        all = all && tokens[row] >= kv.length[rows.kv_row(row, heads_kv)];
      if (all) return;
      i64 over = 0;
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) {
        const i64 kept = blend ? static_cast<i64>(rint(taken[row] * (1 - share) + least[row])) : taken[row];
        tokens[row] = kept;
        over += kept - free[row];
      }
      for (; over > 0; --over) {  // rounding only: give back where it gained most
        i64 most = seq * heads;
        double gain = -1;
        for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) {
          const double g = tokens[row] - (taken[row] * (1 - share) + least[row]);
          if (tokens[row] > 0 && g >= gain - 1e-9) {  // equal up to the rounding of decimal shares: the last head gives
            gain = g;
            most = row;
          }
        }
        --tokens[most];
      }
      for (i64 row = seq * heads; row < (seq + 1) * heads; ++row) {
        tokens[row] = (tokens[row] + forced[row]) * unit;
        pairs[row] = tokens[row];
      }
    });
    c.charge(12.0 * count * units, 1.0 * count * units);
  }
};
}  // namespace

LACUNA_PLUGIN(Ada)
