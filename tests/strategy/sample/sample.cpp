// Sound strategies that do nothing, one of each kind.
#include <lacuna/sdk.hpp>

namespace {
using namespace lacuna::sdk;

Info named(const char* name, i32 phases) {
  Info i{};
  i.name = name;
  i.summary = i.paper = i.rule = "-";
  i.phases = phases;
  return i;
}

/// A parameter of every type; plan() fails with what it was given, as text.
struct Echo : Strategy {
  struct Params {
    i32 small = 3;
    i64 large = 5;
    double share = 0.5;
    bool flag = false;
    std::string way = "near";
    std::string note = "";
    Ints list = {1, 2};
    Classes classes = {{2, {0, 1}}, {10, {3}}};
  } params;

  static void schema(Schema<Params>& s) {
    s.field("small", &Params::small, "a small number", "1..8")
        .field("large", &Params::large, "a large number", "0..")
        .knob("share", &Params::share, "a share", "0..1")
        .field("flag", &Params::flag, "a switch")
        .field("way", &Params::way, "a choice", "near|far")
        .field("note", &Params::note, "any text")
        .field("list", &Params::list, "some numbers", "0..99")
        .field("classes", &Params::classes, "some heads");
  }
  static Info info() {
    Info i = named("echo", kPrefill | kDecode);
    i.defaults = R"({"dense_layers": [0, 1], "gqa": "max"})";
    i.presets = R"({"wide": {"small": 8, "share": 1, "dense_layers": []}, "far": {"way": "far"}})";
    i.dense_point = R"({"small": 8, "dense_layers": [], "density": 1.0})";
    return i;
  }
  void plan(Context&, Plan&) override {
    std::string text = detail::to_json(params.small) + " " + detail::to_json(params.large) + " " +
                       detail::to_json(params.share) + " " + detail::to_json(params.flag) + " " + params.way + " '" +
                       params.note + "' " + detail::to_json(params.list) + " " + detail::to_json(params.classes) +
                       " gqa " + std::to_string(static_cast<int>(common.gqa)) + " sinks " +
                       std::to_string(common.sinks);
    throw Failure(text);
  }
  void mark(Context&, const Budget&, Selection&) override {}
};

/// Selects and evicts; has a `sinks` of its own.
struct Both : Strategy {
  struct Params {
    i32 sinks = 4;
  } params;
  static void schema(Schema<Params>& s) { s.field("sinks", &Params::sinks, "first tokens", "0.."); }
  static Info info() {
    Info i = named("both", kDecode | kEvict);
    i.presets = R"({"late": {"cut": "before_question", "recent": 8}})";
    return i;
  }
  void index(Context&, const Dirty&) override {}
  void score(Context&, Scores&) override {}
};

struct Keeper : Strategy {
  static Info info() { return named("keeper", kEvict); }
  void retain(Context&, const Budget&, Kept&) override {}
  void attended(Context&, const Attended&) override {}
};

struct Wrap : Strategy {
  struct Params {
    Base base;
    double top_p = 0.85;
  } params;
  static void schema(Schema<Params>& s) {
    s.field("base", &Params::base, "what it narrows").knob("top_p", &Params::top_p, "mass", "0..1");
  }
  static Info info() {
    Info i = named("wrap", kDecode);
    i.wrapper = 1;
    return i;
  }
  void refine(Context&, const Budget&, Selection&) override {}
};

/// A wrapper that need not be told its base.
struct WrapBoth : Wrap {
  struct Params {
    Base base{R"({"name": "both", "density": 0.25})"};
  } params;
  static void schema(Schema<Params>& s) { s.field("base", &Params::base, "what it narrows"); }
  static Info info() {
    Info i = Wrap::info();
    i.name = "wrap_both";
    return i;
  }
};

/// Parameters that only fit together in some ways, and open ends.
struct Paired : Strategy {
  struct Params {
    i32 block = 8, stride = 4;
    double share = 0.5, least = 1;
  } params;
  static void schema(Schema<Params>& s) {
    s.field("block", &Params::block, "tokens of a block", "1..")
        .field("stride", &Params::stride, "tokens of a group", "1..")
        .field("share", &Params::share, "a share", "0<..1")
        .field("least", &Params::least, "a number", "0<..")
        .require("block, stride", "block is a multiple of stride",
                 [](const Params& p) { return p.block % p.stride == 0; })
        .require("stride", "stride is even", [](const Params& p) { return p.stride % 2 == 0; });
  }
  static Info info() {
    Info i = named("paired", kDecode);
    i.presets = R"({"wide": {"block": 12}})";
    return i;
  }
  void score(Context&, Scores&) override {}
};

/// Takes no budget.
struct Fixed : Strategy {
  struct Params {
    i32 tables = 150;
  } params;
  static void schema(Schema<Params>& s) { s.knob("tables", &Params::tables, "how many", "1.."); }
  static Info info() {
    Info i = named("fixed", kDecode);
    i.dense_point = "{ }";
    i.takes_budget = 0;
    return i;
  }
  void mark(Context&, const Budget&, Selection&) override {}
};

struct Share : Strategy {
  static Info info() { return named("share", kEvict); }
  void allocate_layers(Context&, LayerBudget&) override {}
  void allocate_rows(Context&, const Scores*, Budget&) override {}
};
}  // namespace

LACUNA_PLUGIN(Echo, Both, Keeper, Wrap, WrapBoth, Paired, Fixed, Share)
