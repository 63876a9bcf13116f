// Strategies that each break one rule, named after it.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

Info info_of(const char* name, i32 phases) {
  Info i{};
  i.name = name;
  i.summary = i.paper = i.rule = "-";
  i.phases = phases;
  return i;
}

/// Marks, for every row, what `row_of(row)` says.
template <class F>
void mark_rows(Selection& s, F row_of) {
  for (i64 row = 0; row < s.rows.count(); ++row) row_of(row, s.tokens + row * s.token_capacity, s.token_count[row]);
}

i64 visible(const Context& c, const Rows& rows, i64 row) {
  const i32 heads = c.layer().num_kv_heads;
  return c.kv().length[rows.kv_row(row, heads)] - rows.num_queries + rows.query_end(row);
}

struct ForeignIndex : Strategy {
  static Info info() { return info_of("bad_index", kPrefill | kDecode); }
  void mark(Context& c, const Budget&, Selection& s) override {
    mark_rows(
        s, [&](i64 row, i32* tokens, i32& count) { tokens[0] = static_cast<i32>(visible(c, s.rows, row)), count = 1; });
  }
};

struct Duplicate : Strategy {
  static Info info() { return info_of("bad_duplicate", kPrefill | kDecode); }
  void plan(Context&, Plan& p) override { p.max_tokens = 2; }
  void mark(Context&, const Budget&, Selection& s) override {
    mark_rows(s, [](i64, i32* tokens, i32& count) { tokens[0] = tokens[1] = 0, count = 2; });
  }
};

struct NanScore : Strategy {
  static Info info() { return info_of("bad_nan", kPrefill | kDecode | kEvict); }
  void score(Context&, Scores& s) override {
    for (i64 row = 0; row < s.rows.count(); ++row) s.value[row * s.stride] = NAN;
  }
};

struct OverBudget : Strategy {
  static Info info() { return info_of("bad_budget", kPrefill | kDecode); }
  void mark(Context&, const Budget&, Selection& s) override {
    for (i64 row = 0; row < s.rows.count(); ++row) s.exact_window[row] = 1 << 20;
  }
};

struct ReadsBeyond : Strategy {
  static Info info() {
    Info i = info_of("bad_poison", kDecode);
    i.takes_budget = 0;
    return i;
  }
  void mark(Context& c, const Budget&, Selection& s) override {
    const Paged kv = c.kv();
    for (i64 row = 0; row < s.rows.count(); ++row) {
      const i64 kv_row = s.rows.kv_row(row, c.layer().num_kv_heads), length = kv.length[kv_row];
      const bool inside = length % kv.page_size != 0;  // the page has room for one token more
      s.exact_window[row] = inside && std::isnan(kv.key(kv_row, length, 0)) ? 8 : 16;
    }
  }
};

struct Restless : Strategy {
  static Info info() {
    Info i = info_of("bad_restless", kDecode);
    i.takes_budget = 0;
    return i;
  }
  void mark(Context&, const Budget&, Selection& s) override {
    static i32 calls = 0;
    for (i64 row = 0; row < s.rows.count(); ++row) s.exact_window[row] = 8 + calls % 5;
    ++calls;
  }
};

struct HiddenSeed : Strategy {
  static Info info() { return info_of("bad_seed", kDecode); }
  void plan(Context&, Plan& p) override { p.unit_tokens = 16; }
  void score(Context& c, Scores& s) override {
    for (i64 i = 0; i < s.rows.count() * s.stride; ++i) s.value[i] = c.random().uniform(0, static_cast<u64>(i));
  }
};

struct NotDense : Strategy {
  static Info info() {
    Info i = info_of("bad_dense", kDecode);
    i.takes_budget = 0;
    i.dense_point = "{}";
    return i;
  }
  void mark(Context&, const Budget&, Selection& s) override {
    for (i64 row = 0; row < s.rows.count(); ++row) s.exact_window[row] = 300;
  }
};

struct NotNested : Strategy {
  static Info info() {
    Info i = info_of("bad_nested", kDecode);
    i.nested = 1;
    return i;
  }
  void mark(Context& c, const Budget& b, Selection& s) override {
    mark_rows(s, [&](i64 row, i32* tokens, i32& count) {
      const i64 n = visible(c, s.rows, row), k = b.limited ? b.tokens[row] : 1;
      count = static_cast<i32>(k < n ? k : n);
      for (i32 i = 0; i < count; ++i) tokens[i] = k > n / 4 ? static_cast<i32>(n) - count + i : i;
    });
  }
};

struct StaleSide : Strategy {
  static Info info() { return info_of("bad_side", kDecode); }
  void plan(Context&, Plan& p) override {
    p.unit_tokens = 4;
    p.sides[p.num_sides++] = {"first", SidePer::unit, 4, Dtype::f32, 1, 0};
  }
  void index(Context& c, const Dirty& dirty) override {
    if (filled_) return;
    filled_ = true;
    const auto first = c.side<float>("first");
    for (i32 row = 0; row < dirty.rows; ++row)
      for (i64 u = dirty.begin[row]; u < dirty.end[row]; ++u)
        first.at(row, u) = 1.f + std::fabs(c.kv().key(row, u * 4, 0));
  }
  void score(Context& c, Scores& s) override {
    const auto first = c.side<float>("first");
    for (i64 row = 0; row < s.rows.count(); ++row)
      for (i64 u = 0; u < s.units; ++u)
        s.value[row * s.stride + u] = first.at(s.rows.kv_row(row, c.layer().num_kv_heads), u);
  }

 private:
  bool filled_ = false;
};

struct ForeignRefined : Strategy {
  static Info info() {
    Info i = info_of("bad_refine", kDecode);
    i.wrapper = 1;
    return i;
  }
  void refine(Context&, const Budget&, Selection& s) override { s.tokens[0] = -1; }
};

struct Generous : Strategy {
  static Info info() { return info_of("bad_rows", kDecode | kEvict); }
  void allocate_rows(Context&, const Scores*, Budget& b) override {
    for (i64 row = 0; row < b.rows.count(); ++row) b.tokens[row] = b.pairs[row] = 2 * b.pairs[row];
  }
};

struct GenerousLayers : Strategy {
  static Info info() { return info_of("bad_layers", kEvict); }
  void allocate_layers(Context&, LayerBudget& b) override { b.tokens[0] *= 1.5; }
};

struct KeepsForeign : Strategy {
  static Info info() { return info_of("bad_kept", kEvict); }
  void retain(Context& c, const Budget&, Kept& kept) override {
    for (i64 row = 0; row < kept.set.rows.count(); ++row) {
      kept.set.tokens[row * kept.set.token_capacity] = c.kv().max_length;
      kept.set.token_count[row] = 1;
    }
  }
};

[[noreturn]] void thrown(const char* role) { throw Failure(std::string("thrown on purpose in ") + role); }

struct ThrowsInPlan : Strategy {
  static Info info() { return info_of("throws_plan", kPrefill | kDecode); }
  void plan(Context&, Plan&) override { thrown("plan"); }
  void score(Context&, Scores&) override {}
};
struct ThrowsInScore : Strategy {
  static Info info() { return info_of("throws_score", kPrefill | kDecode | kEvict); }
  void score(Context&, Scores&) override { thrown("score"); }
};
struct ThrowsInMark : Strategy {
  static Info info() { return info_of("throws_mark", kPrefill | kDecode); }
  void mark(Context&, const Budget&, Selection&) override { throw 7; }
};
struct ThrowsInIndex : Strategy {
  static Info info() { return info_of("throws_index", kDecode); }
  void plan(Context&, Plan& p) override { p.sides[p.num_sides++] = {"side", SidePer::token, 1, Dtype::f32, 1, 0}; }
  void index(Context&, const Dirty&) override { thrown("index"); }
  void score(Context&, Scores&) override {}
};
struct ThrowsInRefine : Strategy {
  static Info info() {
    Info i = info_of("throws_refine", kDecode);
    i.wrapper = 1;
    return i;
  }
  void refine(Context&, const Budget&, Selection&) override { thrown("refine"); }
};
struct ThrowsInRetain : Strategy {
  static Info info() { return info_of("throws_retain", kEvict); }
  void retain(Context&, const Budget&, Kept&) override { thrown("retain"); }
};
struct ThrowsInAttended : Strategy {
  static Info info() { return info_of("throws_attended", kEvict); }
  void score(Context&, Scores&) override {}
  void attended(Context&, const Attended&) override { thrown("attended"); }
};
struct ThrowsInRows : Strategy {
  static Info info() { return info_of("throws_allocate_rows", kDecode | kEvict); }
  void allocate_rows(Context&, const Scores*, Budget&) override { thrown("allocate_rows"); }
};
struct ThrowsInLayers : Strategy {
  static Info info() { return info_of("throws_allocate_layers", kEvict); }
  void allocate_layers(Context&, LayerBudget&) override { thrown("allocate_layers"); }
};
}  // namespace

LACUNA_PLUGIN(ForeignIndex, Duplicate, NanScore, OverBudget, ReadsBeyond, Restless, HiddenSeed, NotDense, NotNested,
              StaleSide, ForeignRefined, Generous, GenerousLayers, KeepsForeign, ThrowsInPlan, ThrowsInScore,
              ThrowsInMark, ThrowsInIndex, ThrowsInRefine, ThrowsInRetain, ThrowsInAttended, ThrowsInRows,
              ThrowsInLayers)
