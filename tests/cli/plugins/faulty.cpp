// Strategies that load well and then fail, each in one role.
#include <lacuna/sdk.hpp>

#include <limits>

namespace {
using namespace lacuna::sdk;

Info named(const char* name, i32 phases) {
  Info i{};
  i.name = name;
  i.summary = i.paper = i.rule = "-";
  i.phases = phases;
  return i;
}

/// Ranks by position: what is right in all the faulty ones.
struct Ranks : Strategy {
  void plan(Context& c, Plan& p) override {
    p.unit_tokens = c.call().purpose == Purpose::select && c.prefill() ? 16 : 1, p.q_tile = 16;
  }
  void score(Context& c, Scores& s) override {
    const Scores out = s;
    c.for_each(s.rows.count() * s.units, [=] LACUNA_HD(i64 i) {
      out.value[i / out.units * out.stride + i % out.units] = static_cast<float>(i % out.units);
    });
  }
};

struct InPlan : Ranks {
  static Info info() { return named("throws_in_plan", kPrefill | kDecode); }
  void plan(Context&, Plan&) override { throw Failure("plan gave up"); }
};
struct InIndex : Ranks {
  static Info info() { return named("throws_in_index", kPrefill | kDecode); }
  void plan(Context& c, Plan& p) override {
    Ranks::plan(c, p);
    p.sides[p.num_sides++] = {"side", SidePer::token, 1, Dtype::f32, 1, 1};
  }
  void index(Context&, const Dirty&) override { throw Failure("index gave up"); }
};
struct InScore : Ranks {
  static Info info() { return named("throws_in_score", kPrefill | kDecode | kEvict); }
  void score(Context&, Scores&) override { throw 7; }
};
struct InMark : Strategy {
  static Info info() { return named("throws_in_mark", kPrefill | kDecode); }
  void mark(Context&, const Budget&, Selection&) override { throw Failure("mark gave up"); }
};
struct InRefine : Strategy {
  struct Params {
    Base base;
  } params;
  static void schema(Schema<Params>& s) { s.field("base", &Params::base, "what is refined"); }
  static Info info() {
    Info i = named("throws_in_refine", kDecode);
    i.wrapper = 1;
    return i;
  }
  void refine(Context&, const Budget&, Selection&) override { throw Failure("refine gave up"); }
};
struct InAttended : Ranks {
  static Info info() { return named("throws_in_attended", kEvict); }
  void attended(Context&, const Attended&) override { throw Failure("attended gave up"); }
};
struct InRetain : Strategy {
  static Info info() { return named("throws_in_retain", kEvict); }
  void retain(Context&, const Budget&, Kept&) override { throw Failure("retain gave up"); }
};
struct InRows : Strategy {
  static Info info() { return named("throws_in_allocate_rows", kPrefill | kDecode | kEvict); }
  void allocate_rows(Context&, const Scores*, Budget&) override { throw Failure("rows gave up"); }
};
struct InLayers : Strategy {
  static Info info() { return named("throws_in_allocate_layers", kEvict); }
  void allocate_layers(Context&, LayerBudget&) override { throw Failure("layers gave up"); }
};
struct NanScores : Ranks {
  static Info info() { return named("returns_nan", kPrefill | kDecode | kEvict); }
  void score(Context& c, Scores& s) override {
    Ranks::score(c, s);
    s.value[0] = std::numeric_limits<float>::quiet_NaN();
  }
};
struct Foreign : Strategy {
  static Info info() { return named("returns_foreign_indices", kPrefill | kDecode); }
  void mark(Context& c, const Budget&, Selection& s) override {
    const Selection out = s;
    c.for_each(s.rows.count(), [=] LACUNA_HD(i64 row) {
      out.token_count[row] = 1;
      out.tokens[row * out.token_capacity] = 1 << 20;
    });
  }
};
struct ForeignKept : Strategy {
  static Info info() { return named("keeps_foreign_tokens", kEvict); }
  void retain(Context& c, const Budget&, Kept& kept) override {
    const Selection out = kept.set;
    c.for_each(out.rows.count(), [=] LACUNA_HD(i64 row) {
      out.token_count[row] = 1;
      out.tokens[row * out.token_capacity] = 1 << 20;
    });
  }
};
}  // namespace

LACUNA_PLUGIN(InPlan, InIndex, InScore, InMark, InRefine, InAttended, InRetain, InRows, InLayers, NanScores, Foreign,
              ForeignKept)
