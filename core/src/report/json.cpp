#include <algorithm>
#include <filesystem>

#include "lacuna/base/write_text.hpp"
#include "lacuna/report/render.hpp"
#include "report/cost_table.hpp"

namespace lacuna {
namespace {

constexpr int kSchemaVersion = 1;

template <class T>
Json optional(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

Json pair_of(const std::optional<Interval>& interval) {
  return interval ? Json::array({interval->lo, interval->hi}) : Json();
}

Json scenario_of(const StudyResult& study) {
  const Scenario& s = study.scenario;
  Json phases = Json::array(), traces = Json::array();
  for (const ReplayPhase p : s.options.phases) phases.push_back(name_of(p));
  for (const TraceFacts& t : study.traces) traces.push_back(t.file);
  return {{"name", s.name},
          {"file", std::filesystem::path(s.path).filename().string()},
          {"traces", traces},
          {"device", s.device},
          {"phases", phases},
          {"page_size", s.options.page_size},
          {"min_context", optional(s.options.min_context)},
          {"default_density", s.options.default_density},
          {"check", s.options.check}};
}

void add_library(const std::optional<Resolved>& role, std::map<std::string, const StrategyType*>& used) {
  for (const Resolved* r = role ? &*role : nullptr; r; r = r->base.get()) used[r->type->name()] = r->type;
}

Json header_of(const StudyResult& study) {
  Json traces = Json::array();
  for (const TraceFacts& t : study.traces)
    traces.push_back({{"file", t.file},
                      {"id", t.id},
                      {"model", t.model},
                      {"context", t.context},
                      {"num_layers", t.num_layers},
                      {"captured_layers", t.captured_layers},
                      {"num_qo_heads", t.num_qo_heads},
                      {"num_kv_heads", t.num_kv_heads},
                      {"head_dim", t.head_dim},
                      {"prefill_tokens", t.prefill_tokens},
                      {"decode_tokens", t.decode_tokens}});
  std::map<std::string, const StrategyType*> used;
  for (const Cell& c : study.scenario.cells)
    for (const auto* role : {&c.select, &c.evict, &c.allocate}) add_library(*role, used);
  Json strategies = Json::object();
  for (const auto& [name, type] : used)
    strategies[name] = {{"library", std::filesystem::path(type->library()).filename().string()}, {"id", type->id()}};
  Json metric_list = Json::array();
  for (const Metric& m : metrics())
    metric_list.push_back({{"name", m.name},
                           {"unit", m.unit},
                           {"formula", m.formula},
                           {"better", m.better == Better::up ? "up" : "down"}});
  const BuildFacts& b = study.build;
  return {
      {"device", study.device},
      {"build",
       {{"version", b.version}, {"commit", b.commit}, {"compiler", b.compiler}, {"flags", b.flags}, {"cuda", b.cuda}}},
      {"traces", traces},
      {"strategies", strategies},
      {"metrics", metric_list}};
}

Json row_metrics(const Row& row) {
  Json out = Json::object();
  for (const Metric& metric : metrics()) {
    const auto found = row.metrics.find(metric.name);
    if (found == row.metrics.end()) continue;
    const Summary s = summarize(metric, {&found->second});
    out[metric.name] = {{"mean", s.mean},
                        {"interval", pair_of(s.interval)},
                        {"p1", s.p1},
                        {"worst_head", s.worst_head},
                        {"worst_head_index", s.worst_head_index},
                        {"answer", optional(s.answer_mean)},
                        {"queries", s.queries},
                        {"blocks", s.blocks},
                        {"undefined", s.undefined},
                        {"note", s.note}};
  }
  return out;
}

Json row_of(const Row& row) {
  const RowCost& c = row.cost;
  return {{"cell", row.cell < 0 ? Json("noise_floor") : Json(row.cell)},
          {"trace", row.trace},
          {"trace_id", row.trace_id},
          {"model", row.model},
          {"layer", row.layer},
          {"phase", name_of(row.phase)},
          {"status", row.status},
          {"error", row.error.empty() ? Json() : Json(row.error)},
          {"marks", row.marks},
          {"cut", row.cut < 0 ? Json() : Json(row.cut)},
          {"queries", row.queries},
          {"left_out", row.left_out},
          {"min_context", row.min_context},
          {"nominal", optional(row.nominal)},
          {"target_share", row.target_share},
          {"realised_head", row.realised_head},
          {"realised_union", row.realised_union},
          {"read_share", row.read_share},
          {"sparse_rows", row.sparse_rows},
          {"cost",
           {{"select_bytes", c.select_bytes},
            {"select_flops", c.select_flops},
            {"attend_flops", c.attend_flops},
            {"touched_bytes", c.touched_bytes},
            {"kv_bytes", c.kv_bytes},
            {"dense_kv_bytes", c.dense_kv_bytes},
            {"index_bytes", c.index_bytes}}},
          {"metrics", row_metrics(row)},
          {"time", {{"seconds", c.seconds}}}};
}

Json line_of(const Line& line) {
  Json values = Json::object();
  for (const Metric& metric : metrics()) {
    const auto found = line.metrics.find(metric.name);
    if (found == line.metrics.end()) continue;
    const PooledMetric& m = found->second;
    values[metric.name] = {{"mean", m.mean},
                           {"interval", pair_of(m.interval)},
                           {"p1", m.p1},
                           {"worst_head", m.worst_head},
                           {"worst_trace", m.worst_trace},
                           {"worst_layer", m.worst_layer},
                           {"worst_head_index", m.worst_head_index},
                           {"answer", optional(m.answer_mean)},
                           {"queries", m.queries},
                           {"blocks", m.blocks},
                           {"undefined", m.undefined},
                           {"note", m.note}};
  }
  return {
      {"label", line.label},
      {"cells", line.cells},
      {"seeds", line.seeds},
      {"layers", line.layers},
      {"metrics", values},
      {"target", optional(line.target)},
      {"realised",
       {{"sparse_layers", {{"head", line.realised_head}, {"union", line.realised_union}}},
        {"all_layers", {{"head", optional(line.realised_head_all)}, {"union", optional(line.realised_union_all)}}}}},
      {"read_share", line.read_share},
      {"index_share", optional(line.index_share)},
      {"pages_share", optional(line.pages_share)},
      {"touched_share", optional(line.touched_share)},
      {"marks", line.marks},
      {"left_out", line.left_out.empty() ? Json() : Json(line.left_out)}};
}

Json table_of(const Table& t) {
  Json lines = Json::array(), left_out = Json::array();
  for (const Line& line : t.lines) lines.push_back(line_of(line));
  for (const Line& line : t.left_out) left_out.push_back(line_of(line));
  return {{"model", t.model},
          {"phase", name_of(t.phase)},
          {"cut", t.cut.empty() ? Json() : Json(t.cut)},
          {"budget", t.budget},
          {"density", optional(t.density)},
          {"compound", t.compound},
          {"traces", t.traces},
          {"layers", t.layers},
          {"queries", t.queries},
          {"blocks", t.blocks},
          {"left_out_queries", t.left_out_queries},
          {"min_context", t.min_context},
          {"noise_floor", t.noise},
          {"lines", lines},
          {"left_out", left_out},
          {"notes", t.notes}};
}

}  // namespace

Json to_json(const StudyResult& study, const std::vector<Table>& tables) {
  Json cells = Json::array(), rows = Json::array(), aggregates = Json::array(), skips = Json::array();
  for (const Cell& c : study.scenario.cells) {
    Json cell{{"label", c.label}};
    cell.update(c.describe());
    cells.push_back(std::move(cell));
  }
  for (const Row& row : study.rows) rows.push_back(row_of(row));
  for (const Table& table : tables) aggregates.push_back(table_of(table));
  for (const Skip& s : study.skips) {
    Json skip{{"cell", s.cell}, {"phase", name_of(s.phase)}, {"reason", s.reason}};
    if (std::find(skips.begin(), skips.end(), skip) == skips.end()) skips.push_back(std::move(skip));
  }
  Json out = {{"schema", kSchemaVersion},
              {"interrupted", study.interrupted},
              {"scenario", scenario_of(study)},
              {"header", header_of(study)},
              {"cells", cells},
              {"rows", rows},
              {"tables", aggregates},
              {"skips", skips}};
  if (study.cost) out["cost"] = cost_json(*study.cost);
  return out;
}

void write_json(const Json& json, const std::string& path) {
  write_text(json.dump(1, ' ', false, Json::error_handler_t::replace) + '\n', path, "the JSON file");
}

}  // namespace lacuna
