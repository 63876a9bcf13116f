#include "report/cost_table.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "report/escaped.hpp"
#include "report/pool.hpp"

namespace lacuna {
namespace {

std::string us(double value) { return value < 100 ? fmt::format("{:.1f}", value) : fmt::format("{:.0f}", value); }
std::string us(const std::optional<Timing>& t) { return t ? us(t->median_us) : "–"; }

/// Budgets of the roles that act in the phase.
std::string budgets(const Cell& cell, ReplayPhase phase) {
  std::vector<std::string> out;
  const auto add = [&](const char* role, const std::optional<Resolved>& r) {
    if (!r) return;
    std::string text = budget_text(r->budget);
    for (const Resolved* base = r->base.get(); base && text.empty(); base = base->base.get())
      if (const std::string of_base = budget_text(base->budget); !of_base.empty()) text = "base " + of_base;
    if (!text.empty()) out.push_back(role + text);
  };
  const bool both = phase == ReplayPhase::decode && cell.select && cell.evict;
  if (phase != ReplayPhase::prefill) add(both ? "evict " : "", cell.evict);
  if (phase != ReplayPhase::evict) add(both ? "select " : "", cell.select);
  return out.empty() ? "own budget" : fmt::format("{}", fmt::join(out, ", "));
}

std::string flags(const CostRow& row, int samples) {
  std::vector<std::string> out = row.flags;
  if (row.total && row.phase != ReplayPhase::evict) {
    out.emplace_back(row.total->graph ? "graph" : "direct");
    if (row.total->launch_bound) out.emplace_back("launch-bound");
    if (row.total->runs < samples) out.push_back(fmt::format("n = {}", row.total->runs));
  }
  if (row.phase == ReplayPhase::evict) out.emplace_back("host included");
  return fmt::format("{}", fmt::join(out, ", "));
}

std::string line(const StudyResult& study, const CostRow& row) {
  const bool dense = row.cell < 0;
  const Cell* cell = dense ? nullptr : &study.scenario.cells[static_cast<std::size_t>(row.cell)];
  return fmt::format("| {} | {} | {} | {} | {} [{}, {}] | {} | {} | {} | {} | {} | {} |\n",
                     dense ? "dense attention" : escaped(cell->label), dense ? "" : budgets(*cell, row.phase),
                     name_of(row.phase), row.tokens, us(row.total), us(row.total->q1_us), us(row.total->q3_us),
                     us(row.choice), us(row.attention), us(row.index), us(row.lower_bound_us),
                     row.speedup ? fmt::format("{:.2f}", *row.speedup)
                     : dense     ? "1.00"
                                 : "–",
                     flags(row, study.cost->options.samples));
}

std::string clocks_note(const std::vector<CostRow>& rows) {
  int least = 0, most = 0, top = 0;
  std::set<std::string> limits;
  for (const CostRow& row : rows)
    for (const auto& clocks : {row.before, row.after}) {
      if (!clocks) continue;
      least = least == 0 ? clocks->sm_mhz : std::min(least, clocks->sm_mhz);
      most = std::max(most, clocks->sm_mhz);
      top = std::max(top, clocks->sm_max_mhz);
      limits.insert(clocks->throttle);
    }
  if (most == 0) return "- clocks: not known\n";
  return fmt::format("- SM clock before and after the rows: {} to {} MHz of {}; limited by: {}\n", least, most, top,
                     fmt::join(limits, "; "));
}

std::string header(const CostResult& cost) {
  const CostShape& s = cost.options.shape;
  const DevicePeaks& p = cost.peaks;
  std::string out = fmt::format(
      "- layer: {} query heads, {} KV heads, head_dim {}, {}; from {}\n"
      "- peaks of this device: read {:.0f} GB/s, copy {:.0f} GB/s, bf16 products {:.0f} TFLOP/s; L2 {:.0f} MiB; driver "
      "{}, CUDA {}\n",
      s.num_qo_heads, s.num_kv_heads, s.head_dim, cost.options.dtype == sdk::Dtype::bf16 ? "bf16" : "f16",
      cost.source.empty() ? "nothing" : escaped(cost.source), p.read_gb_s, p.copy_gb_s, p.gemm_tflop_s,
      static_cast<double>(p.l2_bytes) / (1 << 20), p.driver, p.cuda);
  for (const std::string& memory : cost.memory) out += "- memory: " + memory + "\n";
  std::vector<std::string> dense;
  for (const CostRow& row : cost.rows)
    if (row.cell < 0 && row.attention)
      dense.push_back(fmt::format("{} at {} tokens {} us", name_of(row.phase), row.tokens, us(row.attention)));
  if (!dense.empty())
    out += fmt::format("- best dense kernel of this run: Lacuna's dense attention, {}\n", fmt::join(dense, "; "));
  return out + clocks_note(cost.rows);
}

constexpr const char* kLegend =
    "Medians in us, quartiles in brackets, cold L2. total: choose and attend (evict: score, allocate and compact, "
    "wall time with the host's part); choice, attention: each alone; index: side data of one appended token. bound: "
    "the "
    "bytes and FLOPs of total at this device's own peaks. × dense: dense attention's time over total. graph: one CUDA "
    "graph a call, direct: launched by the host; launch-bound: too short to tell.\n";

Json timing_json(const std::optional<Timing>& t) {
  if (!t) return {};
  return {{"median_us", t->median_us},
          {"q1_us", t->q1_us},
          {"q3_us", t->q3_us},
          {"runs", t->runs},
          {"graph", t->graph},
          {"nodes", t->nodes},
          {"launch_bound", t->launch_bound}};
}

Json clocks_json(const std::optional<Clocks>& c) {
  if (!c) return {};
  return {{"sm_mhz", c->sm_mhz}, {"memory_mhz", c->memory_mhz}, {"sm_max_mhz", c->sm_max_mhz},
          {"watts", c->watts},   {"celsius", c->celsius},       {"throttle", c->throttle}};
}

}  // namespace

std::string cost_section(const StudyResult& study) {
  if (!study.cost) return "";
  const CostResult& cost = *study.cost;
  std::string out = "\n## Cost on " + cost.device + "\n\n" + header(cost);
  std::string table, failed;
  for (const CostRow& row : cost.rows) {
    if (row.total) {
      table += line(study, row);
      continue;
    }
    const std::string label =
        row.cell < 0 ? "dense attention" : study.scenario.cells[static_cast<std::size_t>(row.cell)].label;
    failed += fmt::format("- {}, {}, {} tokens: {}\n", escaped(label), name_of(row.phase), row.tokens,
                          escaped(row.error.empty() ? row.untimed : row.error));
  }
  if (!table.empty())
    out +=
        "\n| method | budget | phase | tokens | total [q1, q3] | choice | attention | index | bound | × dense | flags "
        "|\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n" +
        table + "\n" + kLegend;
  if (!failed.empty()) out += "\nnot timed:\n\n" + failed;
  return out;
}

Json cost_json(const CostResult& cost) {
  const CostShape& s = cost.options.shape;
  const DevicePeaks& p = cost.peaks;
  Json rows = Json::array();
  for (const CostRow& r : cost.rows)
    rows.push_back({{"cell", r.cell < 0 ? Json("dense_attention") : Json(r.cell)},
                    {"phase", name_of(r.phase)},
                    {"tokens", r.tokens},
                    {"error", r.error.empty() ? Json() : Json(r.error)},
                    {"untimed", r.untimed.empty() ? Json() : Json(r.untimed)},
                    {"total", timing_json(r.total)},
                    {"choice", timing_json(r.choice)},
                    {"attention", timing_json(r.attention)},
                    {"index", timing_json(r.index)},
                    {"bytes", r.bytes},
                    {"flops", r.flops},
                    {"lower_bound_us", r.lower_bound_us},
                    {"speedup", r.speedup ? Json(*r.speedup) : Json()},
                    {"flags", r.flags},
                    {"clocks_before", clocks_json(r.before)},
                    {"clocks_after", clocks_json(r.after)}});
  return {{"device", cost.device},
          {"source", cost.source},
          {"shape",
           {{"num_qo_heads", s.num_qo_heads},
            {"num_kv_heads", s.num_kv_heads},
            {"head_dim", s.head_dim},
            {"tokens", s.tokens},
            {"dtype", cost.options.dtype == sdk::Dtype::bf16 ? "bf16" : "f16"}}},
          {"samples", cost.options.samples},
          {"memory", cost.memory},
          {"peaks",
           {{"name", p.name},
            {"read_gb_s", p.read_gb_s},
            {"copy_gb_s", p.copy_gb_s},
            {"gemm_tflop_s", p.gemm_tflop_s},
            {"l2_bytes", p.l2_bytes},
            {"memory_bytes", p.memory_bytes},
            {"free_bytes", p.free_bytes},
            {"sms", p.sms},
            {"driver", p.driver},
            {"cuda", p.cuda}}},
          {"rows", rows}};
}

}  // namespace lacuna
