// Uniform random choice: what a method must beat.
//
//   score(unit) = uniform(seed, layer, step; head, tile, unit)
//   unit = block of 64 in prefill, page of 16 in decode, token in eviction
//   the first unit and the diagonal, current or last one are forced, inside the budget.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

struct RandomChoice : Strategy {
  static constexpr i32 kBlock = 64, kPage = 16;

  static Info info() {
    Info i{};
    i.name = "random";
    i.summary = "seeded uniform choice of units";
    i.paper = "-";
    i.rule =
        "score(unit) = uniform(seed, layer, head, tile or step, unit); first and diagonal, current or last unit forced";
    i.phases = kPrefill | kDecode | kEvict;
    i.dense_point = R"({"density": 1.0})";
    i.stochastic = 1;
    i.nested = 1;
    return i;
  }

  void plan(Context& c, Plan& p) override {
    const bool evict = c.call().purpose == Purpose::evict;
    p.q_tile = kBlock;
    p.unit_tokens = evict ? 1 : c.prefill() ? kBlock : kPage;
    p.score_kind = ScoreKind::rank;
    if (evict) {
      p.sinks = p.sinks > 1 ? p.sinks : 1;
      p.recent = p.recent > 1 ? p.recent : 1;
    } else {
      p.first_units = p.last_units = 1;
    }
  }

  void score(Context& c, Scores& s) override {
    const Random random = c.random();
    const Rows rows = s.rows;
    const i64 units = s.units, stride = s.stride;
    float* value = s.value;
    c.for_each(rows.count() * units, [=] LACUNA_HD(i64 i) {
      const i64 row = i / units, unit = i % units;
      // Keyed by what the row is, not by where it stands, so that the range of tiles in a call does not matter.
      const u64 head = static_cast<u64>(rows.seq_of(row)) * rows.heads + rows.head_of(row);
      const u64 tile = static_cast<u64>(rows.tile_of(row));
      value[row * stride + unit] = random.uniform(head, tile << 32 | static_cast<u64>(unit));
    });
    c.charge(4.0 * rows.count() * units, 0.0);
  }
};
}  // namespace

LACUNA_PLUGIN(RandomChoice)
