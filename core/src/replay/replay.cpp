#include "lacuna/replay/replay.hpp"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <memory>
#include <mutex>
#include <thread>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/layer_replay.hpp"
#include "replay/layer_run.hpp"
#include "replay/needs.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// Layers of a short trace that a GPU works on at a time: their steps are short, and the host's part of one runs beside
/// the others'. One where memory is not plentiful.
int layers_at_once(const Trace& trace, const ReplayOptions& options) {
  constexpr int kMost = 8, kThreadsEach = 2;
  constexpr i64 kShort = 16384;
  const TraceInfo& info = trace.info();
  if (!options.device->on_device() || info.tokens() > kShort) return 1;
  const std::size_t layer = LayerReplay::memory(trace, info.captured_layers.front(), options.page_size).total();
  const auto room = static_cast<int>(std::min<std::size_t>(kMost, options.device->free_bytes() / (4 * layer)));
  return std::clamp(std::min(omp_get_max_threads() / kThreadsEach, static_cast<int>(info.captured_layers.size())), 1,
                    std::max(room, 1));
}

std::vector<ReplayResult> run_layers(const Trace& trace, const std::vector<Cell>& cells, const ReplayOptions& options,
                                     AcrossLayers& across, int at_once) {
  const std::vector<int>& layers = trace.info().captured_layers;
  std::vector<ReplayResult> out(layers.size());
  std::mutex reporting;
  std::atomic<std::size_t> next = 0;
  std::vector<std::exception_ptr> thrown(layers.size());
  const auto work = [&](const ReplayOptions& mine) {
    for (std::size_t i; (i = next++) < layers.size();) {
      if (mine.stop && mine.stop()) return;
      try {
        run_layer(trace, layers[i], cells, mine, across, out[i]);
      } catch (...) {
        thrown[i] = std::current_exception();
        next = layers.size();
      }
    }
  };
  if (at_once == 1) {
    work(options);
  } else {
    std::vector<std::shared_ptr<Device>> devices;  // a stream each
    for (int t = 0; t < at_once; ++t) devices.push_back(cuda_device());
    std::vector<std::jthread> threads;
    const int host_threads = std::max(1, omp_get_max_threads() / at_once);
    for (int t = 0; t < at_once; ++t)
      threads.emplace_back([&, host_threads, device = devices[static_cast<std::size_t>(t)]] {
        omp_set_num_threads(host_threads);
        ReplayOptions mine = options;
        mine.device = device;
        if (options.on_row)
          mine.on_row = [&](const Row& row) {
            const std::lock_guard lock(reporting);
            options.on_row(row);
          };
        work(mine);
      });
  }
  for (const std::exception_ptr& e : thrown)
    if (e) std::rethrow_exception(e);
  return out;
}

/// One layer's rows of two passes, as one pass would have given them: by phase and cut, then by cell.
std::vector<Row> merged(std::vector<Row> rows, std::vector<Row> more) {
  if (more.empty()) return rows;
  std::move(more.begin(), more.end(), std::back_inserter(rows));
  std::vector<std::pair<ReplayPhase, i64>> parts;
  const auto part = [&](const Row& row) {
    return std::find(parts.begin(), parts.end(), std::pair(row.phase, row.cut)) - parts.begin();
  };
  for (const Row& row : rows)
    if (part(row) == static_cast<std::ptrdiff_t>(parts.size())) parts.emplace_back(row.phase, row.cut);
  std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::stable_sort(rows.begin(), rows.end(),
                   [&](const Row& a, const Row& b) { return std::pair(part(a), a.cell) < std::pair(part(b), b.cell); });
  return rows;
}

/// Layers side by side for the cells that allow it; a second pass, in order, for those that carry something from layer
/// to layer.
std::vector<std::vector<Row>> run_passes(const Trace& trace, const std::vector<Cell>& cells,
                                         const ReplayOptions& options, AcrossLayers& across) {
  std::set<int> in_order, free;
  for (std::size_t i = 0; i < cells.size(); ++i)
    (asks_for(cells[i], kNeedsAllLayers) ? in_order : free).insert(static_cast<int>(i));
  const int at_once = layers_at_once(trace, options);
  across.now = free;
  if (at_once == 1) across.now.merge(in_order);
  std::vector<ReplayResult> first = run_layers(trace, cells, options, across, at_once), second(first.size());
  if (!in_order.empty()) {
    across.now = in_order;
    across.noise = false;
    second = run_layers(trace, cells, options, across, 1);
  }
  std::vector<std::vector<Row>> out;
  for (std::size_t i = 0; i < first.size(); ++i)
    out.push_back(merged(std::move(first[i].rows), std::move(second[i].rows)));
  return out;
}

}  // namespace

i64 default_min_context(double density, i64 prompt_tokens) {
  const double least = std::min(32.0 / density, static_cast<double>(prompt_tokens) / 2.0);
  return (static_cast<i64>(std::ceil(least)) + 63) / 64 * 64;
}

void check_cell(const Cell& cell, const TraceInfo& info) {
  const auto check = [&](const std::optional<Resolved>& role, RoleKind kind) {
    if (!role) return;
    const std::vector<int> named = role->dense_layers();
    // A method's own default may be of a deeper model: what a user names is meant.
    for (const ParamSpec& p : role->type->params(kind))
      if (p.name == "dense_layers" && Json::parse(p.default_json).get<std::vector<int>>() == named) return;
    for (const int layer : named)
      if (layer >= info.num_layers)
        throw lacuna::Error(Problem{"dense_layers of '" + role->type->name() + "' name a layer that the model has not",
                                    "0.." + std::to_string(info.num_layers - 1), std::to_string(layer), info.path,
                                    "change dense_layers"});
  };
  check(cell.select, RoleKind::select);
  check(cell.evict, RoleKind::evict);
}

ReplayResult replay(const Trace& trace, const std::vector<Cell>& cells, const ReplayOptions& options) {
  ReplayResult result;
  AcrossLayers across;
  for (const Cell& cell : cells) check_cell(cell, trace.info());
  for (std::size_t i = 0; i < cells.size(); ++i)
    for (const ReplayPhase phase : options.phases) {
      std::string reason = why_skipped(cells[i], phase, trace.info());
      if (reason.empty()) reason = missing_need(cells[i], trace, options.allow_leak);
      if (reason.empty()) continue;
      across.skipped.insert({static_cast<int>(i), phase});
      result.skips.push_back({static_cast<int>(i), phase, std::move(reason)});
    }
  for (std::size_t i = 0; i < cells.size(); ++i)
    for (const ReplayPhase phase : options.phases) across.carried[{static_cast<int>(i), phase}];
  across.entropy = layer_entropy(trace, cells);
  for (std::vector<Row>& of_layer : run_passes(trace, cells, options, across))
    std::move(of_layer.begin(), of_layer.end(), std::back_inserter(result.rows));
  return result;
}

}  // namespace lacuna
