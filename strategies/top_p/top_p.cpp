// Top-p budgets: a row gets as many units as it takes to hold a share p of its own mass. Ours.
//
//   n_r = forced units + the smallest descending prefix of row r's other scores whose sum reaches p times their sum; at
//         least one unit
//   rows that share a target: the heads of a layer (eviction, decode), or of one query tile of it (prefill)
//   no budget:  row r gets n_r
//   a budget:   the target is shared out in proportion to n_r, in whole units; what a row cannot use goes to the
//               others, in the same proportion; the last units go by the largest remainders, ties to the lower head
//
// Scores are taken for masses: negative ones count nothing, and a scorer that is not comparable across heads arrives
// as ranks, which make all rows nearly equal. Forced: sinks, recent tokens, scores of +inf.
#include <lacuna/sdk.hpp>
#include <lacuna/sdk/compete.hpp>
#include <lacuna/sdk/share_out.hpp>

namespace {
using namespace lacuna::sdk;

constexpr i64 kRowsAtOnce = 4096, kLanes = 65536;

/// Mass of the units of a row, in parts that one thread sums.
struct RowMass {
  Rows rows;
  const i32* length;
  const float* value;
  i64 stride, units, unit, parts;
  i32 heads_kv, sinks, recent, one_query;  // one_query: targets count tokens (eviction)

  LACUNA_HD i64 visible(i64 row) const {  // slots, to the row's last query
    return length[rows.kv_row(row, heads_kv)] - rows.num_queries + rows.query_end(row);
  }
  LACUNA_HD bool forced(i64 row, i64 u) const {
    return ForcedUnits{unit, sinks, recent}.hold(u, visible(row), value[row * stride + u]);
  }
  LACUNA_HD float mass(i64 row, i64 u) const {
    const float v = value[row * stride + u];
    return v > 0.f && !forced(row, u) ? v : 0.f;
  }
  LACUNA_HD i64 begin(i64 part) const { return part * units / parts; }
  LACUNA_HD i64 end(i64 row, i64 part) const {
    const i64 last = (visible(row) + unit - 1) / unit, e = begin(part + 1);
    return e < last ? e : last;
  }
  /// Sum of the masses of a part that are at least float_of_bits(least).
  LACUNA_HD double sum(i64 row, i64 part, u32 least) const {
    double total = 0;
    for (i64 u = begin(part), e = end(row, part); u < e; ++u) {
      const float m = mass(row, u);
      if (bits_of_float(m) >= least) total += static_cast<double>(m);
    }
    return total;
  }
};

struct TopP : Strategy {
  struct Params {
    double p = .9;
  } params;

  static void schema(Schema<Params>& s) {
    s.knob("p", &Params::p, "share of its mass that a row's units must hold", "0<..1");
  }
  static Info info() {
    Info i{};
    i.name = "top_p";
    i.summary = "a row's budget is the number of units that hold a share of its mass";
    i.paper = "-";
    i.rule = "n_r = units to reach mass p in row r; targets in proportion to n_r, largest remainders";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    return i;
  }

  void plan(Context&, Plan& p) override {
    p.workspace_bytes = (kLanes + kRowsAtOnce) * 16 + kRowsAtOnce * 12 + 4 * 256;
  }

  void allocate_rows(Context& c, const Scores* scores, Budget& b) override {
    if (!scores) return;  // nothing that has mass
    RowMass m{b.rows,
              c.kv().length,
              scores->value,
              scores->stride,
              scores->units,
              scores->unit_tokens,
              1,
              c.layer().num_kv_heads,
              b.sinks,
              b.recent,
              c.call().purpose == Purpose::evict};
    double* sums = c.workspace<double>(kLanes + kRowsAtOnce);
    double* counts = c.workspace<double>(kLanes + kRowsAtOnce);
    double* goal = c.workspace<double>(kRowsAtOnce);
    i32* threshold = c.workspace<i32>(kRowsAtOnce);
    for (i64 first = 0; first < b.rows.count(); first += kRowsAtOnce) {
      const i64 rest = b.rows.count() - first, count = rest < kRowsAtOnce ? rest : kRowsAtOnce;
      const i64 most = (m.units + 63) / 64, lanes = kLanes / count;
      m.parts = lanes < most ? lanes : most;
      find_thresholds(c, m, first, count, sums, goal, threshold);
      count_units(c, m, first, count, sums, counts, goal, threshold, b.tokens);
    }
    if (b.limited)
      share(c, m, b);
    else
      take_own(c, m, b);
    const double read = 33.0 * static_cast<double>(b.rows.count()) * static_cast<double>(m.units);
    c.charge(4.0 * read, read);
  }

  /// threshold[i]: bits of the largest t such that the masses of row first + i that are at least t sum to goal[i].
  void find_thresholds(Context& c, const RowMass& m, i64 first, i64 count, double* sums, double* goal,
                       i32* threshold) const {
    const RowMass of = m;
    const double p = params.p;
    c.for_each(count, [=] LACUNA_HD(i64 i) { threshold[i] = 0; });
    for (i32 bit = 31; bit >= 0; --bit) {  // round 31: everything, for the goal
      const u32 step = bit == 31 ? 0 : u32{1} << bit;
      c.for_each(count * of.parts, [=] LACUNA_HD(i64 i) {
        const i64 at = i / of.parts;
        sums[i] = of.sum(first + at, i % of.parts, static_cast<u32>(threshold[at]) | step);
      });
      c.for_each(count, [=] LACUNA_HD(i64 i) {
        double sum = 0;
        for (i64 part = 0; part < of.parts; ++part) sum += sums[i * of.parts + part];
        if (step == 0)
          goal[i] = p * sum;
        else if (sum >= goal[i])
          threshold[i] |= static_cast<i32>(step);
      });
    }
  }

  /// n[row]: forced units, masses above the threshold, and as many at it as the goal asks for.
  void count_units(Context& c, const RowMass& m, i64 first, i64 count, double* sums, double* counts, const double* goal,
                   const i32* threshold, i64* n) const {
    const RowMass of = m;
    const bool all = params.p >= 1;
    c.for_each(count * of.parts, [=] LACUNA_HD(i64 i) {
      const i64 row = first + i / of.parts, part = i % of.parts;
      const u32 above = static_cast<u32>(threshold[i / of.parts]) + 1;
      sums[i] = of.sum(row, part, above);
      counts[i] = 0;
      for (i64 u = of.begin(part), e = of.end(row, part); u < e; ++u)
        counts[i] += all || of.forced(row, u) || bits_of_float(of.mass(row, u)) >= above;
    });
    c.for_each(count, [=] LACUNA_HD(i64 i) {
      double sum = 0, found = 0;
      for (i64 part = 0; part < of.parts; ++part) {
        sum += sums[i * of.parts + part];
        found += counts[i * of.parts + part];
      }
      const double at = static_cast<double>(float_of_bits(static_cast<u32>(threshold[i])));
      if (!all && goal[i] > sum) found += ceil((goal[i] - sum) / at);
      n[first + i] = found > 1 ? static_cast<i64>(found) : 1;
    });
  }

  /// Slots of a row's queries, and what they see of each other.
  struct Span {
    i64 begin, end;
    LACUNA_HD Span(const RowMass& m, i64 row) : end(m.visible(row)) {
      begin = m.one_query ? end - 1 : end - (m.rows.query_end(row) - m.rows.query_begin(row));
    }
    LACUNA_HD i64 queries() const { return end - begin; }
    LACUNA_HD i64 pairs() const { return (end * (end + 1) - begin * (begin + 1)) / 2; }
  };

  void take_own(Context& c, const RowMass& m, Budget& b) const {
    const RowMass of = m;
    i64 *tokens = b.tokens, *pairs = b.pairs;
    c.for_each(b.rows.count(), [=] LACUNA_HD(i64 row) {
      const Span span(of, row);
      const bool whole = tokens[row] * of.unit >= span.end;
      tokens[row] = whole ? span.end : tokens[row] * of.unit;
      pairs[row] = whole ? span.pairs() : tokens[row] * span.queries();
    });
    b.limited = 1;
  }

  /// tokens [rows] come as the units n_r.
  void share(Context& c, const RowMass& m, Budget& b) const {
    const RowMass of = m;
    i64 *tokens = b.tokens, *pairs = b.pairs;
    const i64 heads = b.rows.heads, tiles = b.rows.tiles;
    c.for_each(b.rows.seqs * tiles, [=] LACUNA_HD(i64 pool) {
      const i64 begin = pool / tiles * heads * tiles + pool % tiles, end = begin + heads * tiles;
      const auto most = [=](i64 row) { return (of.visible(row) + of.unit - 1) / of.unit; };
      i64 total = 0;
      bool whole = true;
      for (i64 row = begin; row < end; row += tiles) {
        total += pairs[row];
        whole = whole && pairs[row] >= Span(of, row).pairs();
      }
      if (!whole)
        share_out(
            static_cast<double>(total / (of.unit * Span(of, begin).queries())), begin, heads, tiles,
            [=](i64 row) { return static_cast<double>(tokens[row]); }, most, pairs);
      for (i64 row = begin; row < end; row += tiles) {
        const Span span(of, row);
        if (!whole) pairs[row] *= of.unit * span.queries();
        tokens[row] = whole ? span.end : pairs[row] / span.queries();
      }
    });
  }
};
}  // namespace

LACUNA_PLUGIN(TopP)
