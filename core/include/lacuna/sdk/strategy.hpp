// The class that a strategy derives from, and the registration that turns it into a table of C functions.
#pragma once

#include <boost/dll/alias.hpp>
#include <exception>
#include <memory>
#include <type_traits>

#include "lacuna/sdk/params.hpp"

namespace lacuna::sdk {

inline constexpr u64 kMagic = 0x6c6163756e615f31ull;  // "lacuna_1"
inline constexpr i32 kAbiMajor = 1, kAbiMinor = 2;
inline constexpr const char* kSdkVersion = "0.1.0";
#if defined(_GLIBCXX_USE_CXX11_ABI) && _GLIBCXX_USE_CXX11_ABI
inline constexpr const char* kCxxRuntime = "libstdc++-cxx11";
#elif defined(_LIBCPP_VERSION)
inline constexpr const char* kCxxRuntime = "libc++";
#else
inline constexpr const char* kCxxRuntime = "libstdc++-old";
#endif

/// What calibration gathers. The queries and keys of the call are those of one trace's layer: all its tokens, prompt
/// and continuation. Host memory, fp64 sums over the traces; what put() is given becomes the calibration file.
class Calibration {
 public:
  i32 trace = 0, traces = 1;  // this call's trace of the layer's; the last one writes the results
  bool last() const { return trace == traces - 1; }
  /// n sums of this layer, zero at its first trace and kept until its last.
  virtual double* sums(const char* name, i64 n) noexcept = 0;
  /// An array of this layer for the file; rank at most 3.
  virtual void put(const char* name, const float* values, i32 rank, const i64* extent) noexcept = 0;

 protected:
  ~Calibration() = default;
};

/// A strategy implements the roles it needs and no others: which ones it overrides is found at compile time and decides
/// what it can be used for. A ranking method implements score(); an explicit one mark() (select) or retain() (evict).
/// Order of calls per layer and phase:
///   index -> score -> (core: reduce by gqa) -> allocate_rows -> (core: force, top-k | top-p) | mark -> refine ->
///   (core: attend) -> attended -> (evict due?) score(evict) -> allocate_rows -> retain | (core: top-k) -> rewrite ->
///   compaction -> index
class Strategy {
 public:
  /// Host, once per shape: unit, tile, forced units, sides, states, workspace.
  virtual void plan(Context&, Plan&) {}
  /// Brings the sides of `dirty` units up to date; must be a pure function of the units' content (and of state).
  virtual void index(Context&, const Dirty&) {}
  /// Ranks units: select (phase prefill or decode) and evict.
  virtual void score(Context&, Scores&) {}
  /// Chooses explicitly (select).
  virtual void mark(Context&, const Budget&, Selection&) {}
  /// Wrappers: narrows or re-weights the base's choice, which stands in the selection.
  virtual void refine(Context&, const Budget&, Selection&) {}
  /// Allocators, host: tokens of each model layer.
  virtual void allocate_layers(Context&, LayerBudget&) {}
  /// Allocators: moves pairs between the rows of a layer (prefill: of a range of tiles). `scores` null where the scorer
  /// does not rank.
  virtual void allocate_rows(Context&, const Scores*, Budget&) {}
  /// Evicts explicitly; default: top-k of score(evict).
  virtual void retain(Context&, const Budget&, Kept&) {}
  /// After attention; in a prefill after each range of tiles, whose rows `read` names: only their results are there.
  virtual void attended(Context&, const Attended&) {}
  /// Changes what is kept: after an eviction's tokens are chosen and before the cache is compacted (eviction).
  virtual void rewrite(Context&, const Rewrite&) {}
  /// `lacuna calibrate`: fills the arrays of a Data parameter; once per trace and layer, layer by layer, on the CPU.
  virtual void calibrate(Context&, Calibration&) {}
  virtual ~Strategy() = default;

  Common common;  // filled before plan()
};

enum Phases : i32 { kPrefill = 1, kDecode = 2, kEvict = 4 };

/// What a strategy cannot do without; where it is missing the strategy is skipped, and the row says why.
enum Needs : i32 {
  kNeedsAllLayers = 1,   // every layer of the model, in order
  kNeedsProjection = 2,  // W_O
  kNeedsStatistics = 4,  // LayerBudget::entropy
  kNeedsQuestion = 8,    // a question in the prompt
  kNeedsData = 16        // a file for its Data parameter
};

/// What a strategy says about itself. Texts are static.
struct Info {
  const char* name;
  const char* summary;  // one line
  const char* paper;    // reference, or "-"
  const char* rule;     // pseudocode
  i32 phases;           // Phases in which the roles may be used
  const char* defaults =
      "{}";  // JSON: defaults of the common parameters, where they differ (gqa, dense_layers, sinks, recent)
  const char* presets = "{}";       // JSON: name -> {parameter: value}
  const char* dense_point = "";     // JSON {parameter: value, "density": x}: where it equals dense; "" if nowhere
  i32 clairvoyant = 0;              // may ask for the true mass
  i32 stochastic = 0;               // depends on the seed
  i32 query_aware = 0;              // eviction: scores depend on the last queries
  i32 comparable_across_heads = 0;  // scores of different heads of a layer may be compared
  i32 nested = 0;                   // a larger budget's set contains a smaller one's
  i32 takes_budget = 1;             // 0: only its own parameters (or a budget knob)
  i32 wrapper = 0;                  // needs base = {...}
  i32 needs = 0;                    // Needs
  const char* cost = "";            // selection work as a formula, for one decode step, prefill or eviction; "": none
};

/// The table that crosses the boundary. A role that the class does not override is null.
struct Entry {
  i32 bytes;
  const char *name, *summary, *paper, *rule, *defaults, *presets, *dense_point;
  i32 phases, clairvoyant, stochastic, query_aware, comparable_across_heads, nested, takes_budget, wrapper;
  const Param* params;
  i32 num_params;
  i32 (*create)(const char* parameters_json, const Common*, Strategy**, Error*);
  void (*destroy)(Strategy*);
  i32 (*plan)(Strategy*, Services*, Plan*, Error*);
  i32 (*index)(Strategy*, Services*, const Dirty*, Error*);
  i32 (*score)(Strategy*, Services*, Scores*, Error*);
  i32 (*mark)(Strategy*, Services*, const Budget*, Selection*, Error*);
  i32 (*refine)(Strategy*, Services*, const Budget*, Selection*, Error*);
  i32 (*allocate_layers)(Strategy*, Services*, LayerBudget*, Error*);
  i32 (*allocate_rows)(Strategy*, Services*, const Scores*, Budget*, Error*);
  i32 (*retain)(Strategy*, Services*, const Budget*, Kept*, Error*);
  i32 (*attended)(Strategy*, Services*, const Attended*, Error*);
  // Since ABI 1.1.
  const Constraint* constraints;
  i32 num_constraints;
  /// `broken`: the first constraint that the parameters break, or -1.
  i32 (*check)(const char* parameters_json, i32* broken, Error*);
  i32 device_code;  // 1: nvcc compiled it, so that its loops run on a GPU too
  // Since ABI 1.2.
  i32 needs;
  const char* cost;
  i32 (*rewrite)(Strategy*, Services*, const Rewrite*, Error*);
  i32 (*calibrate)(Strategy*, Services*, Calibration*, Error*);
};

/// The exported symbol `lacuna_plugin`.
struct Descriptor {
  u64 magic;
  i32 abi_major, abi_minor, bytes, entry_bytes;
  const char *cxx_runtime, *sdk_version;
  const Entry* const* entries;
  i32 num_entries;
};

namespace detail {

inline void fill(Error* error, const char* text) {
  error->code = 1;
  std::snprintf(error->text, sizeof error->text, "%s", text);
}

template <class F>
i32 guarded(Error* error, F f) noexcept {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    fill(error, e.what());
  } catch (...) {
    fill(error, "an exception that is not a std::exception");
  }
  return 1;
}

template <class T, class = void>
struct params_of {
  struct type {};
};
template <class T>
struct params_of<T, std::void_t<typename T::Params>> {
  using type = typename T::Params;
};

/// Builds the static table of strategy class T. Hidden, since otherwise two libraries that name a class alike would
/// share its statics (STB_GNU_UNIQUE ignores RTLD_LOCAL).
template <class T>
class __attribute__((visibility("hidden"))) EntryFor {
  using P = typename params_of<T>::type;
  static const Schema<P>& schema() {
    static const Schema<P> s = [] {
      Schema<P> out;
      if constexpr (requires { T::schema(out); }) T::schema(out);
      return out;
    }();
    return s;
  }
  static i32 create(const char* json, const Common* common, Strategy** out, Error* error) {
    return guarded(error, [&] {
      auto made = std::make_unique<T>();
      made->common = *common;
      if constexpr (requires(T t) { t.params; }) made->params = schema().read(json);
      *out = made.release();
    });
  }
  static i32 check(const char* json, i32* broken, Error* error) {
    return guarded(error, [&] {
      const P params = schema().read(json);
      const auto& rules = schema().constraints;
      *broken = 0;
      while (*broken < static_cast<i32>(rules.size()) && rules[static_cast<std::size_t>(*broken)].holds(params))
        ++*broken;
      if (*broken == static_cast<i32>(rules.size())) *broken = -1;
    });
  }

 public:
  /// Null if info(), schema() or the constructor of Params throws: this runs while the library is loaded.
  static const Entry* get() noexcept {
    try {
      return table();
    } catch (...) {
      return nullptr;
    }
  }

 private:
  static const Entry* table() {
    static const std::vector<Param> params = [] {
      std::vector<Param> out;
      for (const auto& f : schema().fields)
        out.push_back({f.name.c_str(), f.doc.c_str(), f.type.c_str(), f.default_value.c_str(), f.range.c_str(),
                       f.is_budget_knob});
      return out;
    }();
    static const std::vector<Constraint> constraints = [] {
      std::vector<Constraint> out;
      for (const auto& rule : schema().constraints) out.push_back({rule.text.c_str(), rule.names.c_str()});
      return out;
    }();
    static const Entry entry = [] {
      const Info info = T::info();
      Entry e{};
      e.bytes = sizeof(Entry);
      e.name = info.name;
      e.summary = info.summary;
      e.paper = info.paper;
      e.rule = info.rule;
      e.defaults = info.defaults;
      e.presets = info.presets;
      e.dense_point = info.dense_point;
      e.phases = info.phases;
      e.clairvoyant = info.clairvoyant;
      e.stochastic = info.stochastic;
      e.query_aware = info.query_aware;
      e.comparable_across_heads = info.comparable_across_heads;
      e.nested = info.nested;
      e.takes_budget = info.takes_budget;
      e.wrapper = info.wrapper;
      e.needs = info.needs;
      e.cost = info.cost;
      e.params = params.data();
      e.num_params = static_cast<i32>(params.size());
      e.constraints = constraints.data();
      e.num_constraints = static_cast<i32>(constraints.size());
      e.check = &EntryFor::check;
      e.create = &EntryFor::create;
      e.destroy = [](Strategy* s) { delete s; };
#if defined(__CUDACC__)
      e.device_code = 1;
#endif
#define LACUNA_ROLE(role, arguments, call)                                      \
  if constexpr (!std::is_same_v<decltype(&T::role), decltype(&Strategy::role)>) \
    e.role = [] arguments -> i32 {                                              \
      return guarded(error, [&] {                                               \
        Context c(*services);                                                   \
        s->role call;                                                           \
      });                                                                       \
    };
      LACUNA_ROLE(plan, (Strategy * s, Services * services, Plan * x, Error * error), (c, *x))
      LACUNA_ROLE(index, (Strategy * s, Services * services, const Dirty* x, Error* error), (c, *x))
      LACUNA_ROLE(score, (Strategy * s, Services * services, Scores * x, Error * error), (c, *x))
      LACUNA_ROLE(mark, (Strategy * s, Services * services, const Budget* b, Selection* x, Error* error), (c, *b, *x))
      LACUNA_ROLE(refine, (Strategy * s, Services * services, const Budget* b, Selection* x, Error* error), (c, *b, *x))
      LACUNA_ROLE(allocate_layers, (Strategy * s, Services * services, LayerBudget * x, Error * error), (c, *x))
      LACUNA_ROLE(allocate_rows, (Strategy * s, Services * services, const Scores* v, Budget* x, Error* error),
                  (c, v, *x))
      LACUNA_ROLE(retain, (Strategy * s, Services * services, const Budget* b, Kept* x, Error* error), (c, *b, *x))
      LACUNA_ROLE(attended, (Strategy * s, Services * services, const Attended* x, Error* error), (c, *x))
      LACUNA_ROLE(rewrite, (Strategy * s, Services * services, const Rewrite* x, Error* error), (c, *x))
      LACUNA_ROLE(calibrate, (Strategy * s, Services * services, Calibration * x, Error * error), (c, *x))
#undef LACUNA_ROLE
      return e;
    }();
    return &entry;
  }
};

}  // namespace detail
}  // namespace lacuna::sdk

/// Exports the given strategy classes from this library; once per library, at namespace scope.
#define LACUNA_PLUGIN(...)                                                                                 \
  namespace lacuna_plugin_detail {                                                                         \
  template <class... T>                                                                                    \
  struct Table {                                                                                           \
    static const ::lacuna::sdk::Descriptor* get() {                                                        \
      static const ::lacuna::sdk::Entry* const entries[] = {::lacuna::sdk::detail::EntryFor<T>::get()...}; \
      static const ::lacuna::sdk::Descriptor descriptor = {::lacuna::sdk::kMagic,                          \
                                                           ::lacuna::sdk::kAbiMajor,                       \
                                                           ::lacuna::sdk::kAbiMinor,                       \
                                                           sizeof(::lacuna::sdk::Descriptor),              \
                                                           sizeof(::lacuna::sdk::Entry),                   \
                                                           ::lacuna::sdk::kCxxRuntime,                     \
                                                           ::lacuna::sdk::kSdkVersion,                     \
                                                           entries,                                        \
                                                           sizeof...(T)};                                  \
      return &descriptor;                                                                                  \
    }                                                                                                      \
  };                                                                                                       \
  const ::lacuna::sdk::Descriptor descriptor = *Table<__VA_ARGS__>::get();                                 \
  }                                                                                                        \
  BOOST_DLL_ALIAS(lacuna_plugin_detail::descriptor, lacuna_plugin)
