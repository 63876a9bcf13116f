#include "report/pool.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "report/shares.hpp"

namespace lacuna {
namespace {

bool is_worse(const Metric& metric, double a, double b) { return metric.better == Better::up ? a < b : a > b; }

std::uint64_t seed_of(const StudyResult& study, const Row& row) {
  return row.cell < 0 ? 0 : study.scenario.cells[static_cast<std::size_t>(row.cell)].seed;
}

/// Seeds first: a head's statistics are those over all its seeds, so that its worst is no luck of a single draw, and
/// the tail is the tail of a run, averaged over the runs.
PooledMetric pool_metric(const StudyResult& study, const Metric& metric, const std::vector<const Row*>& rows) {
  PooledMetric out;
  std::vector<TraceMean> means;
  std::map<std::uint64_t, BlockStats> samples;
  double answers = 0;
  int answered = 0;
  for (const TraceFacts& trace : study.traces) {
    std::map<int, std::vector<const LayerStats*>> runs;
    for (const Row* row : rows) {
      const auto found = row->metrics.find(metric.name);
      if (row->trace_id != trace.id || found == row->metrics.end()) continue;
      runs[row->layer].push_back(&found->second);
      for (const BlockStats& block : found->second.cells) samples[seed_of(study, *row)].merge(block);
    }
    if (runs.empty()) continue;
    std::vector<int> numbers;
    std::vector<LayerStats> pooled;
    for (const auto& [layer, of_layer] : runs) {
      numbers.push_back(layer);
      pooled.push_back(pool_runs(metric, of_layer));
    }
    std::vector<const LayerStats*> layers;
    for (const LayerStats& layer : pooled) layers.push_back(&layer);
    const Summary s = summarize(metric, layers);
    if (means.empty() || is_worse(metric, s.worst_head, out.worst_head)) {
      out.worst_head = s.worst_head;
      out.worst_trace = trace.file;
      out.worst_layer = numbers[static_cast<std::size_t>(s.worst_layer_index)];
      out.worst_head_index = s.worst_head_index;
    }
    if (s.answer_mean) answers += *s.answer_mean, ++answered;
    out.queries += s.queries;
    out.blocks += s.blocks;
    out.undefined += s.undefined;
    out.interval = s.interval;
    out.note = s.note;
    means.push_back({s.mean, trace.context});
  }
  if (answered > 0) out.answer_mean = answers / answered;
  double tails = 0;
  for (const auto& [seed, run] : samples)
    tails += run.quantile(metric.better == Better::up ? 0.01 : 0.99, metric.scale);
  out.p1 = tails / static_cast<double>(samples.size());
  const TracesSummary pooled = pool_traces(means);
  out.mean = pooled.mean;
  if (means.size() > 1) {
    out.interval = pooled.interval;
    out.note = pooled.note;
  }
  return out;
}

std::optional<double> share(double part, double whole) {
  return whole > 0 ? std::optional(part / whole) : std::nullopt;
}

}  // namespace

Line pool_rows(const StudyResult& study, const MethodRows& method, const std::vector<int>& layers,
               const MethodRows* dense) {
  Line line;
  line.label = method.label;
  line.cells = method.cells;
  std::vector<const Row*> rows;
  std::set<std::uint64_t> seeds;
  std::set<int> pooled;
  for (const Row* row : method.rows) {
    if (std::find(layers.begin(), layers.end(), row->layer) == layers.end()) continue;
    rows.push_back(row);
    pooled.insert(row->layer);
    if (row->cell >= 0) seeds.insert(study.scenario.cells[static_cast<std::size_t>(row->cell)].seed);
    for (const std::string& mark : row->marks) line.marks.insert(mark);
  }
  line.layers.assign(pooled.begin(), pooled.end());
  line.seeds.assign(seeds.begin(), seeds.end());
  for (const Metric& metric : metrics())
    if (std::any_of(rows.begin(), rows.end(), [&](const Row* r) { return r->metrics.count(metric.name) > 0; }))
      line.metrics[metric.name] = pool_metric(study, metric, rows);
  if (method.cells.empty()) return line;

  fill_shares(study, method, line);
  double index = 0, pages = 0, dense_pages = 0, touched = 0, dense_touched = 0;
  for (const Row* row : rows) {
    index += row->cost.index_bytes;
    pages += row->cost.kv_bytes;
    dense_pages += row->cost.dense_kv_bytes;
    if (!dense) continue;
    for (const Row* d : dense->rows) {
      if (d->trace_id != row->trace_id || d->layer != row->layer) continue;
      touched += row->cost.touched_bytes;
      dense_touched += d->cost.touched_bytes;
      break;
    }
  }
  line.index_share = share(index, dense_pages);
  line.pages_share = share(pages, dense_pages);
  line.touched_share = share(touched, dense_touched);
  return line;
}

Json acting_roles(const Cell& cell, ReplayPhase phase) {
  Json out = Json::object();
  if (cell.select && phase != ReplayPhase::evict) out["select"] = cell.select->describe();
  if (cell.evict && phase != ReplayPhase::prefill) out["evict"] = cell.evict->describe();
  if (cell.allocate) out["allocate"] = cell.allocate->describe();
  return out;
}

const Resolved* budget_role(const Cell& cell, ReplayPhase phase) {
  const auto& role = phase == ReplayPhase::evict ? cell.evict : cell.select ? cell.select : cell.evict;
  return role ? &*role : nullptr;
}

std::string budget_text(const BudgetSpec& budget) {
  switch (budget.kind) {
    case BudgetSpec::Kind::none: return "";
    case BudgetSpec::Kind::density: return fmt::format("density {}", budget.value);
    case BudgetSpec::Kind::tokens: return fmt::format("tokens {}", budget.value);
    case BudgetSpec::Kind::units: return fmt::format("units {}", budget.value);
    case BudgetSpec::Kind::mass: return fmt::format("mass {}", budget.value);
  }
  return "";
}

}  // namespace lacuna
