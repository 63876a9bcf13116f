#include "lacuna/report/tables.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "report/pool.hpp"

namespace lacuna {
namespace {

constexpr const char* kOwnBudget = "own budget";
constexpr std::size_t kLeastSeeds = 5;

/// What decides which table a row stands in.
struct TableKey {
  std::string model;
  ReplayPhase phase;
  std::string cut;
  BudgetSpec::Kind kind;
  double value;
  bool compound = false;  // decode: selects from what an eviction left, so that the budgets multiply
  BudgetSpec::Kind evict_kind = BudgetSpec::Kind::none;
  double evict_value = 0;

  auto order() const {
    return std::tuple(kind == BudgetSpec::Kind::none, kind, value, compound, evict_kind == BudgetSpec::Kind::none,
                      evict_kind, evict_value);
  }
  bool operator==(const TableKey&) const = default;
};

/// "density 0.2", or "evict density 0.5 × density 0.2" where an eviction comes first.
std::string title_of(const TableKey& key) {
  const auto text = [](BudgetSpec::Kind kind, double value) {
    const std::string budget = budget_text({kind, value, false});
    return budget.empty() ? std::string(kOwnBudget) : budget;
  };
  const std::string own = text(key.kind, key.value);
  return key.compound ? fmt::format("evict {} × {}", text(key.evict_kind, key.evict_value), own) : own;
}

bool is_compound(const Cell& cell, ReplayPhase phase) {
  return phase == ReplayPhase::decode && cell.select && cell.evict;
}

/// Dense whatever its parameters: stands in every table.
bool is_baseline(const Cell& cell, ReplayPhase phase) {
  if (is_compound(cell, phase)) return false;
  const Resolved* role = budget_role(cell, phase);
  return role && !cell.allocate && role->type->always_dense();
}

/// Budgets that the table's title does not say: those of bases.
std::string hidden_budgets(const Cell& cell, ReplayPhase phase) {
  std::vector<std::string> out;
  const Resolved* role = budget_role(cell, phase);
  for (const Resolved* r = role ? role->base.get() : nullptr; r; r = r->base.get())
    if (const std::string text = budget_text(r->budget); !text.empty()) out.push_back("base " + text);
  return out.empty() ? "" : fmt::format(" [{}]", fmt::join(out, ", "));
}

/// A method's rows in one table, and its settings.
struct Method {
  Json settings;
  bool baseline = false;
  MethodRows rows;
};

struct Group {
  TableKey key;
  std::vector<Method> methods;
};

class Tabulator {
 public:
  explicit Tabulator(const StudyResult& study) : study_(study) {}

  std::vector<Table> run() {
    find_failures();
    for (const Row& row : study_.rows)
      if (row.cell >= 0 && !failed_.count({row.phase, row.cell}) && !row.marked("sliding-window")) add(row);
    share_baselines();
    std::stable_sort(groups_.begin(), groups_.end(), [&](const Group& a, const Group& b) {
      const auto place = [&](const Group& g) {
        return std::tuple(model_place(g.key.model), g.key.phase, cut_place(g.key.cut), g.key.order());
      };
      return place(a) < place(b);
    });
    std::vector<Table> out;
    for (const Group& group : groups_) out.push_back(make_table(group));
    return out;
  }

 private:
  /// A method that failed anywhere in a phase is not compared there: its other layers are other layers than the rest's.
  void find_failures() {
    for (const Row& row : study_.rows)
      if (row.status != "ok") failed_.insert({row.phase, row.cell});
  }

  void add(const Row& row) {
    const Cell& cell = study_.scenario.cells[static_cast<std::size_t>(row.cell)];
    const Resolved* role = budget_role(cell, row.phase);
    const BudgetSpec budget = role ? role->budget : BudgetSpec{};
    const std::string cut = row.phase == ReplayPhase::evict ? cut_parameter(cell) : "";
    if (!cut.empty() && std::find(cuts_.begin(), cuts_.end(), cut) == cuts_.end()) cuts_.push_back(cut);
    TableKey key{row.model, row.phase, cut, budget.kind, budget.value};
    if (is_compound(cell, row.phase)) {
      key.compound = true;
      key.evict_kind = cell.evict->budget.kind;
      key.evict_value = cell.evict->budget.value;
    }
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.key == key; });
    if (group == groups_.end()) group = groups_.insert(group, {key, {}});
    const Json settings = acting_roles(cell, row.phase);
    auto& methods = group->methods;
    auto method = std::find_if(methods.begin(), methods.end(), [&](const Method& m) { return m.settings == settings; });
    if (method == methods.end()) {
      // In decode, an eviction that nothing selects from stands beside selections of the same name.
      const bool evicted = row.phase == ReplayPhase::decode && !cell.select;
      const std::string label = cell.label + (evicted ? " (evict)" : "") + hidden_budgets(cell, row.phase);
      method = methods.insert(method, {settings, is_baseline(cell, row.phase), {label, {}, {}}});
    }
    auto& cells = method->rows.cells;
    if (std::find(cells.begin(), cells.end(), row.cell) == cells.end()) {
      // Another cell that acts alike under the same seed says nothing new.
      const bool twin = std::any_of(cells.begin(), cells.end(), [&](int c) {
        return study_.scenario.cells[static_cast<std::size_t>(c)].seed == cell.seed;
      });
      if (twin) return;
      cells.push_back(row.cell);
    }
    method->rows.rows.push_back(&row);
  }

  void share_baselines() {
    std::vector<Group> own;
    for (const Group& g : groups_)
      if (g.key.kind == BudgetSpec::Kind::none && !g.key.compound) own.push_back(g);
    for (const Group& from : own) {
      bool elsewhere = false;
      for (Group& to : groups_) {
        const TableKey &a = from.key, &b = to.key;
        if (a == b || std::tie(a.model, a.phase, a.cut) != std::tie(b.model, b.phase, b.cut)) continue;
        elsewhere = true;
        for (const Method& m : from.methods)
          if (m.baseline) to.methods.push_back(m);
      }
      // A table of baselines alone says what the others say.
      if (elsewhere && std::all_of(from.methods.begin(), from.methods.end(), [](const auto& m) { return m.baseline; }))
        groups_.erase(std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.key == from.key; }));
    }
  }

  Table make_table(const Group& group) const {
    Table table;
    table.model = group.key.model;
    table.phase = group.key.phase;
    table.cut = group.key.cut;
    table.budget = title_of(group.key);
    table.compound = group.key.compound;
    if (group.key.kind == BudgetSpec::Kind::density) table.density = group.key.value;
    for (const TraceFacts& t : study_.traces)
      if (t.model == table.model) table.traces.push_back(t.file);
    table.layers = compared_layers(group, table);
    const MethodRows* baseline = nullptr;
    for (const Method& m : group.methods)
      if (m.baseline && !baseline) baseline = &m.rows;
    add_noise(group, table);
    for (const Method& m : group.methods) {
      Line line = pool_rows(study_, m.rows, table.layers, baseline);
      line.left_out = why_left_out(m, line);
      if (line.layers.size() < table.layers.size()) line.marks.insert("partial");
      (line.left_out.empty() ? table.lines : table.left_out).push_back(std::move(line));
    }
    const auto mass = [](const Line& l) {
      const auto found = l.metrics.find("mass_kept");
      return found == l.metrics.end() || std::isnan(found->second.mean) ? -1.0 : found->second.mean;
    };
    std::stable_sort(table.lines.begin(), table.lines.end(), [&](const Line& a, const Line& b) {
      return std::tuple(-mass(a), a.label) < std::tuple(-mass(b), b.label);
    });
    std::stable_sort(table.left_out.begin(), table.left_out.end(),
                     [](const Line& a, const Line& b) { return a.label < b.label; });
    count_queries(group, table);
    add_notes(table);
    return table;
  }

  /// Every layer that is captured and that no method keeps dense; a method whose every layer is dense has no say.
  static std::vector<int> compared_layers(const Group& group, Table& table) {
    std::set<int> all, dense;
    for (const Method& m : group.methods) {
      std::set<int> of_method, kept;
      for (const Row* row : m.rows.rows) {
        of_method.insert(row->layer);
        if (row->marked("dense-layer")) kept.insert(row->layer);
      }
      all.insert(of_method.begin(), of_method.end());
      if (kept != of_method) dense.insert(kept.begin(), kept.end());
    }
    std::vector<int> out;
    std::set_difference(all.begin(), all.end(), dense.begin(), dense.end(), std::back_inserter(out));
    if (!dense.empty())
      table.notes.push_back(
          fmt::format("layers {} are kept dense by a method and left out for all", fmt::join(dense, ", ")));
    return out;
  }

  std::string why_left_out(const Method& method, const Line& line) const {
    if (line.layers.empty()) return "no layer of it is sparse";
    int floor = 0, off = 0, rows = 0;
    for (const Row* row : method.rows.rows) {
      if (row->marked("dense-layer")) continue;
      ++rows;
      floor += row->marked("floor");
      off += row->marked("off-budget");
    }
    if (floor == 0 && off == 0) return "";
    const std::optional<double> nominal = method.rows.rows.front()->nominal;
    const std::string realised = fmt::format("realised {:.3f}{}", line.realised_head,
                                             nominal ? fmt::format(", asked for {:.3f}", *nominal) : "");
    if (floor > 0)
      return fmt::format("floor: what it must read exceeds the budget in {} of {} rows; {}", floor, rows, realised);
    return fmt::format("off-budget: it misses the budget by more than 1 % in {} of {} rows; {}", off, rows, realised);
  }

  void add_noise(const Group& group, Table& table) const {
    std::set<std::tuple<std::string, int, std::int64_t>> wanted;
    for (const Method& m : group.methods)
      for (const Row* row : m.rows.rows) wanted.insert({row->trace_id, row->layer, row->cut});
    MethodRows noise{"noise floor (bf16 dense, against fp64)", {}, {}};
    for (const Row& row : study_.rows) {
      const bool here = row.cell < 0 && row.phase == table.phase && row.model == table.model;
      // A decode row of a method with a cut keeps -1 there, as the noise row does.
      if (here && wanted.count({row.trace_id, row.layer, row.cut})) noise.rows.push_back(&row);
    }
    if (noise.rows.empty()) return;
    table.noise_line = pool_rows(study_, noise, table.layers, nullptr);
    for (const auto& [name, metric] : table.noise_line.metrics)
      table.noise[name] = std::abs(metric.mean - dense_value(name));
  }

  static void count_queries(const Group& group, Table& table) {
    for (const Method& m : group.methods) {
      if (m.baseline && group.methods.size() > 1) continue;
      for (const Row* row : m.rows.rows) {
        table.left_out_queries = std::max(table.left_out_queries, row->left_out);
        table.min_context = std::max(table.min_context, row->min_context);
      }
    }
    for (const auto* lines : {&table.lines, &table.left_out})
      for (const Line& line : *lines) {
        const auto found = line.metrics.find("mass_kept");
        if (found == line.metrics.end()) continue;
        table.queries = std::max(table.queries, found->second.queries);
        table.blocks = std::max(table.blocks, found->second.blocks);
      }
  }

  static void add_notes(Table& table) {
    std::set<std::string> reasons;
    std::vector<std::string> few;
    for (const Line& line : table.lines) {
      const auto found = line.metrics.find("mass_kept");
      if (found != line.metrics.end() && !found->second.note.empty()) reasons.insert(found->second.note);
      if (line.marks.count("stochastic") && line.seeds.size() < kLeastSeeds)
        few.push_back(fmt::format("{} ({})", line.label, line.seeds.size()));
    }
    for (const std::string& reason : reasons) table.notes.push_back(reason);
    if (!few.empty())
      table.notes.push_back(fmt::format("fewer than {} seeds, so that luck of the draw is not averaged out: {}",
                                        kLeastSeeds, fmt::join(few, ", ")));
    if (table.compound)
      table.notes.push_back(
          "the second budget is of what the eviction left: read % is the product, of dense attention's pairs. Compare "
          "with a method of one role at that read %, not at one of the two budgets");
    if (table.phase == ReplayPhase::prefill)
      table.notes.push_back(
          "replay's blind spot: layer l + 1 still sees the dense K/V of the trace, so errors do not add up over "
          "layers");
  }

  std::size_t model_place(const std::string& model) const {
    return static_cast<std::size_t>(
        std::find_if(study_.traces.begin(), study_.traces.end(), [&](const auto& t) { return t.model == model; }) -
        study_.traces.begin());
  }
  std::size_t cut_place(const std::string& cut) const {
    return static_cast<std::size_t>(std::find(cuts_.begin(), cuts_.end(), cut) - cuts_.begin());
  }

  const StudyResult& study_;
  std::set<std::pair<ReplayPhase, int>> failed_;
  std::vector<std::string> cuts_;
  std::vector<Group> groups_;
};

}  // namespace

TraceFacts facts_of(const Trace& trace) {
  const TraceInfo& info = trace.info();
  TraceFacts out;
  const auto slash = info.path.find_last_of('/');
  out.file = slash == std::string::npos ? info.path : info.path.substr(slash + 1);
  out.id = trace.content_id();
  out.model = info.model;
  const auto context = info.provenance.find("context_id");
  if (context != info.provenance.end()) out.context = context->second;
  out.num_layers = info.num_layers;
  out.num_qo_heads = info.num_qo_heads;
  out.num_kv_heads = info.num_kv_heads;
  out.head_dim = info.head_dim;
  out.captured_layers = info.captured_layers;
  for (const auto& [layer, window] : info.sliding_window)
    if (window > 0) out.sliding_window[layer] = window;
  out.mixed_layers = info.mixed_layers;
  out.prefill_tokens = info.prefill_tokens;
  out.decode_tokens = info.decode_tokens;
  return out;
}

double dense_value(const std::string& metric) { return metric == "mass_kept" || metric == "output_cosine" ? 1 : 0; }

std::vector<Table> tabulate(const StudyResult& study) { return Tabulator(study).run(); }

}  // namespace lacuna
