#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "lacuna/report/render.hpp"
#include "report/cost_table.hpp"
#include "report/escaped.hpp"

namespace lacuna {
namespace {

std::string number(double value) {
  if (!std::isfinite(value)) return "–";
  if (value == 0) return "0";
  return std::abs(value) < 5e-4 ? fmt::format("{:.1e}", value) : fmt::format("{:.4f}", value);
}

/// "0–29, 31": ascending layers, runs of three or more as ranges.
std::string layer_list(const std::vector<int>& layers) {
  std::vector<std::string> out;
  for (std::size_t i = 0, run = 1; i < layers.size(); i += run) {
    for (run = 1; i + run < layers.size() && layers[i + run] == layers[i] + static_cast<int>(run);) ++run;
    if (run < 3) run = 1;
    out.push_back(run == 1 ? std::to_string(layers[i]) : fmt::format("{}–{}", layers[i], layers[i + run - 1]));
  }
  return fmt::format("{}", fmt::join(out, ", "));
}

std::string percent(const std::optional<double>& share) {
  return share && std::isfinite(*share) ? fmt::format("{:.1f}", 100 * *share) : "–";
}

class TableWriter {
 public:
  explicit TableWriter(const Table& table) : table_(table) {
    for (const char* name :
         {"regret", "lse_error", "output_rel_l2", "output_cosine", "layer_rel_l2", "tail_value_bias"})
      if (any([&](const Line& l) { return l.metrics.count(name) > 0; })) columns_.push_back(name);
    has_answer_ = any([](const Line& l) {
      const auto m = l.metrics.find("mass_kept");
      return m != l.metrics.end() && m->second.answer_mean;
    });
    has_touched_ = table.phase != ReplayPhase::evict && any([](const Line& l) { return l.touched_share.has_value(); });
    has_pages_ = table.phase != ReplayPhase::prefill;
  }

  std::string text() const {
    std::string out = title() + "\n\n" + row(headings()) + row(rules());
    if (!table_.noise_line.metrics.empty()) out += row(cells(table_.noise_line, true));
    for (const Line& line : table_.lines) out += row(cells(line, false));
    if (!table_.left_out.empty()) {
      out += table_.density ? "\nleft out at this density:\n\n" : "\nleft out:\n\n";
      for (const Line& line : table_.left_out) out += "- " + escaped(line.label) + ": " + line.left_out + "\n";
    }
    return out + "\n" + notes();
  }

 private:
  template <class F>
  bool any(F f) const {
    return std::any_of(table_.lines.begin(), table_.lines.end(), f);
  }

  std::string title() const {
    std::string out = fmt::format("## {}, {}", name_of(table_.phase), table_.budget);
    if (!table_.cut.empty()) out += ", cut = " + table_.cut;
    return out + " (" + table_.model + ")";
  }

  static std::string row(const std::vector<std::string>& cells) {
    return fmt::format("| {} |\n", fmt::join(cells, " | "));
  }

  std::vector<std::string> headings() const {
    std::vector<std::string> out = {"method", "layers n", "mass_kept [95 %]"};
    out.insert(out.end(), columns_.begin(), columns_.end());
    out.insert(out.end(), {"p1", "worst head"});
    if (has_answer_) out.emplace_back("answer");
    out.emplace_back("realised head / union");
    if (has_pages_) out.insert(out.end(), {"read %", "pages %"});
    out.emplace_back("index %");
    if (has_touched_) out.emplace_back("touched %");
    out.emplace_back("marks");
    return out;
  }
  std::vector<std::string> rules() const {
    std::vector<std::string> out(headings().size(), "---:");
    out.front() = out.back() = "---";
    return out;
  }

  /// Within the noise of exact dense attention, or of fp32 sums, there is nothing to tell apart.
  std::string value(const std::string& metric, double x) const {
    constexpr double kRounding = 1e-6;
    const auto noise = table_.noise.find(metric);
    const double ideal = dense_value(metric), off = std::abs(x - ideal);
    const bool same = off <= std::max(kRounding, noise == table_.noise.end() ? 0 : noise->second);
    return same && off > 0 ? fmt::format("≈{}", ideal) : number(x);
  }

  std::vector<std::string> cells(const Line& line, bool noise) const {
    const auto find = [&](const std::string& name) {
      const auto found = line.metrics.find(name);
      return found == line.metrics.end() ? nullptr : &found->second;
    };
    const auto shown = [&](const std::string& name, double x) { return noise ? number(x) : value(name, x); };
    std::vector<std::string> out = {escaped(line.label), std::to_string(line.layers.size())};
    const PooledMetric* mass = find("mass_kept");
    std::string kept = mass ? shown("mass_kept", mass->mean) : "–";
    if (mass && mass->interval && !noise)
      kept += fmt::format(" [{:.4f}, {:.4f}]", mass->interval->lo, mass->interval->hi);
    out.push_back(kept);
    for (const std::string& name : columns_) {
      const PooledMetric* m = find(name);
      out.push_back(m ? shown(name, m->mean) : "–");
    }
    if (noise || !mass) {
      out.resize(headings().size(), "");
      return out;
    }
    out.push_back(number(mass->p1));
    out.push_back(fmt::format("{} (L{} H{})", number(mass->worst_head), mass->worst_layer, mass->worst_head_index));
    if (has_answer_) out.push_back(mass->answer_mean ? shown("mass_kept", *mass->answer_mean) : "–");
    // Without a selection a decode step reads all that is cached: read % tells.
    const bool selects = table_.phase != ReplayPhase::decode || line.selects;
    out.push_back(selects ? fmt::format("{:.3f} / {:.3f}", line.realised_head, line.realised_union) : "–");
    if (has_pages_) out.insert(out.end(), {percent(line.read_share), percent(line.pages_share)});
    out.push_back(percent(line.index_share));
    if (has_touched_) out.push_back(percent(line.touched_share));
    out.push_back(fmt::format("{}", fmt::join(line.marks, ", ")));
    return out;
  }

  std::string notes() const {
    std::string out = fmt::format("- n: layers {}", layer_list(table_.layers));
    out += fmt::format("; {} queries in {} blocks", table_.queries, table_.blocks);
    if (table_.traces.size() > 1) out += fmt::format(" of {} traces", table_.traces.size());
    if (table_.phase == ReplayPhase::prefill)
      out += fmt::format("; {} queries left out (min_context = {} visible tokens)", table_.left_out_queries,
                         table_.min_context);
    out += "\n";
    for (const std::string& note : table_.notes) out += "- " + escaped(note) + "\n";
    return out;
  }

  const Table& table_;
  std::vector<std::string> columns_;
  bool has_answer_ = false, has_touched_ = false, has_pages_ = false;
};

std::string header(const StudyResult& study) {
  std::string out = "# " + study.scenario.name + "\n\n";
  for (const TraceFacts& t : study.traces)
    out += fmt::format(
        "- trace: {} (id {}), {}: layers {} of {}, {} query heads, {} KV heads, head_dim {}, {} + {} tokens\n", t.file,
        t.id, t.model, layer_list(t.captured_layers), t.num_layers, t.num_qo_heads, t.num_kv_heads, t.head_dim,
        t.prefill_tokens, t.decode_tokens);
  const BuildFacts& b = study.build;
  out += fmt::format("- device: {}\n- build: lacuna {} ({}), {}, {}, CUDA {}\n", study.device, b.version, b.commit,
                     b.compiler, b.flags, b.cuda);
  out += fmt::format("- run: page_size {}{}\n", study.scenario.options.page_size,
                     study.scenario.options.check ? ", contracts checked" : "");
  std::set<std::pair<std::string, int>> windows;
  for (const Row& row : study.rows)
    if (row.marked("sliding-window")) windows.insert({row.trace, row.layer});
  for (const auto& [trace, layer] : windows)
    out += fmt::format("- {} layer {} has a sliding window: it runs with it, outside budgets and comparisons\n", trace,
                       layer);
  if (study.interrupted) out += "- interrupted: what follows is not the whole study\n";
  return out;
}

constexpr const char* kLegend =
    "Means over layers and heads. mass_kept: dense probability of what was read; p1, worst head (layer, head) and "
    "answer "
    "(answer span alone) are of mass_kept. ≈: within the noise floor of exact dense attention. realised: share of the "
    "pairs (evict: of the tokens before the cut) per query head / union of a group. read %: pairs read, of dense "
    "attention's. pages %, index %: K + V pages held at the end and side data, of the dense K + V. touched %: K + V "
    "bytes "
    "fetched, of those that `dense` fetched.\n";

std::string skips(const StudyResult& study) {
  std::map<std::pair<ReplayPhase, std::string>, std::vector<std::string>> by_reason;
  for (const Skip& s : study.skips) {
    auto& labels = by_reason[{s.phase, s.reason}];
    const Cell& cell = study.scenario.cells[static_cast<std::size_t>(s.cell)];
    std::string label = cell.label;
    // The same strategy may select in one cell and evict in another.
    if (!cell.allocate && !(cell.select && cell.evict)) label += cell.select ? " (select)" : " (evict)";
    if (std::find(labels.begin(), labels.end(), label) == labels.end()) labels.push_back(std::move(label));
  }
  std::string out;
  for (const auto& [why, labels] : by_reason)
    out += fmt::format("- {}: {}: {}\n", name_of(why.first), escaped(why.second),
                       escaped(fmt::format("{}", fmt::join(labels, ", "))));
  return out.empty() ? "" : "\n## Skipped\n\n" + out;
}

std::string failures(const StudyResult& study) {
  std::map<std::tuple<int, ReplayPhase, std::string>, std::set<int>> layers;
  for (const Row& row : study.rows)
    if (row.status != "ok") layers[{row.cell, row.phase, row.error}].insert(row.layer);
  std::string out;
  for (const auto& [what, where] : layers) {
    const auto& [cell, phase, error] = what;
    out += fmt::format("- {}, {}, layers {}: {}\n", escaped(study.scenario.cells[static_cast<std::size_t>(cell)].label),
                       name_of(phase), layer_list({where.begin(), where.end()}), escaped(error));
  }
  return out.empty() ? "" : "\n## Failed\n\n" + out;
}

}  // namespace

std::string to_markdown(const StudyResult& study, const std::vector<Table>& tables) {
  std::string out = header(study);
  for (const Table& table : tables) out += "\n" + TableWriter(table).text();
  if (!tables.empty()) out += std::string("\n") + kLegend;
  return out + cost_section(study) + skips(study) + failures(study);
}

}  // namespace lacuna
