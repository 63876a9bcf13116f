#include "report/pool.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace lacuna {
namespace {

bool is_sparse(const Row& row) { return !row.marked("dense-layer") && !row.marked("sliding-window"); }

bool is_worse(const Metric& metric, double a, double b) { return metric.better == Better::up ? a < b : a > b; }

/// The rows of one trace, in the order of seeds and layers, that hold the metric.
PooledMetric pool_metric(const StudyResult& study, const Metric& metric, const std::vector<const Row*>& rows) {
  PooledMetric out;
  std::vector<TraceMean> means;
  BlockStats samples;
  double answers = 0;
  int answered = 0;
  for (const TraceFacts& trace : study.traces) {
    std::vector<const LayerStats*> layers;
    std::vector<const Row*> used;
    for (const Row* row : rows) {
      const auto found = row->metrics.find(metric.name);
      if (row->trace_id != trace.id || found == row->metrics.end()) continue;
      layers.push_back(&found->second);
      used.push_back(row);
    }
    if (layers.empty()) continue;
    const Summary s = summarize(metric, layers);
    for (const LayerStats* layer : layers)
      for (const BlockStats& block : layer->cells) samples.merge(block);
    if (means.empty() || is_worse(metric, s.worst_head, out.worst_head)) {
      out.worst_head = s.worst_head;
      out.worst_trace = trace.file;
      out.worst_layer = used[static_cast<std::size_t>(s.worst_layer_index)]->layer;
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
  out.p1 = samples.quantile(metric.better == Better::up ? 0.01 : 0.99, metric.scale);
  const TracesSummary pooled = pool_traces(means);
  out.mean = pooled.mean;
  if (means.size() > 1) {
    out.interval = pooled.interval;
    out.note = pooled.note;
  }
  return out;
}

double ratio(double part, double whole) { return whole > 0 ? part / whole : std::nan(""); }

std::optional<double> share(double part, double whole) {
  return whole > 0 ? std::optional(part / whole) : std::nullopt;
}

/// Shares over the sparse layers, and with the model's dense ones at 1.
void fill_shares(const StudyResult& study, const MethodRows& method, Line& line) {
  double head = 0, shared = 0, target = 0, read = 0;
  int sparse = 0, targets = 0;
  for (const Row* row : method.rows) {
    read += row->read_share;
    if (!is_sparse(*row)) continue;
    head += row->realised_head;
    shared += row->realised_union;
    ++sparse;
    if (row->target_share > 0) target += row->target_share, ++targets;
  }
  line.read_share = ratio(read, static_cast<double>(method.rows.size()));
  if (targets > 0) line.target = target / targets;
  if (sparse > 0) {
    line.realised_head = head / sparse;
    line.realised_union = shared / sparse;
  }
  const Row& first = *method.rows.front();
  const Cell& cell = study.scenario.cells[static_cast<std::size_t>(first.cell)];
  const Resolved* role = budget_role(cell, first.phase);
  line.selects = cell.select.has_value();
  const auto facts = std::find_if(study.traces.begin(), study.traces.end(),
                                  [&](const TraceFacts& t) { return t.id == first.trace_id; });
  const double layers = facts == study.traces.end() ? 0 : facts->num_layers;
  double dense = 0;
  if (role)
    for (const int layer : role->dense_layers()) dense += layer < layers;
  const auto over_all = [&](double realised) {
    return layers > 0 ? (realised * (layers - dense) + dense) / layers : realised;
  };
  line.realised_head_all = over_all(line.realised_head);
  line.realised_union_all = over_all(line.realised_union);
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
