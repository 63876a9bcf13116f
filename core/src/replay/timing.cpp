#include "lacuna/replay/timing.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "lacuna/replay/replay.hpp"
#include "replay/needs.hpp"
#include "replay/phase_run.hpp"
#include "replay/timing_bench.hpp"

namespace lacuna {
using namespace sdk;

namespace {

constexpr double kLaunchBoundUs = 20;  // shorter is mostly launches, whatever empty kernels take
constexpr int kEvictions = 5;
constexpr double kMostSeconds = 10;  // of one time: a long prefill has fewer samples than asked for

bool is_clairvoyant(const std::optional<Resolved>& role) {
  for (const Resolved* r = role ? &*role : nullptr; r; r = r->base.get())
    if (r->type->entry().clairvoyant) return true;
  return false;
}

/// Everything at one length.
class LengthRun {
 public:
  LengthRun(const TiledLayer& tiled, i64 tokens, const CostOptions& options, const CostRun& run, const Meter& meter)
      : options_(options), meter_(meter), layer_(tiled, tokens, run.page_size, options.dtype, run.device) {}

  CostRow dense(ReplayPhase phase) {
    return timed(-1, phase, [&](CostRow& row) {
      const Cell everything;
      const Layer& l = layer_.layer();
      const i64 tokens = layer_.tokens(), begin = phase == ReplayPhase::decode ? tokens - 1 : 0;
      SelectBench bench(layer_, everything, phase, copies(phase));
      Meter::Variants variants;
      for (int i = 0; i < copies(phase); ++i)
        variants.push_back(
            [&, i] { bench.pipeline(i).attend_to(bench.span(), nullptr, {}, layer_.out(), layer_.lse()); });
      row.attention = row.total = measure(variants);
      row.bytes = static_cast<double>(layer_.kv_bytes());
      row.flops = attention_flops(static_cast<double>(l.num_qo_heads) *
                                  static_cast<double>(capped_pairs(tokens, begin, tokens)));
    });
  }

  CostRow cell(const Cell& cell, int index, ReplayPhase phase, const CostRow* dense) {
    return timed(index, phase, [&](CostRow& row) {
      if (layer_.device()->on_device() && !runs_on_device(cell)) {
        row.untimed = "a strategy without code for the GPU";
        return;
      }
      if (asks_for(cell, kNeedsOfTrace)) {
        row.untimed =
            "needs what a layer of another shape has not: other layers, W_O, statistics, a question or a calibration";
        return;
      }
      if (is_clairvoyant(cell.select) || is_clairvoyant(cell.evict)) row.flags.emplace_back("clairvoyant");
      if (keeps_dense(cell, phase)) row.flags.emplace_back("dense-layer");
      if (phase == ReplayPhase::evict) {
        const EvictTimes evicted = time_evictions(layer_, cell, kEvictions);
        row.total = evicted.timing;
        row.bytes = evicted.charged.bytes;
        row.flops = evicted.charged.flops;
        return;
      }
      SelectBench bench(layer_, cell, phase, copies(phase));
      if (bench.evicts_while_decoding()) row.flags.emplace_back("evicts-while-decoding");
      const SelectBench::Work work = bench.work();
      row.bytes = work.charged.bytes + work.reading.slots * layer_.token_bytes();
      row.flops = work.charged.flops + attention_flops(work.reading.pairs);
      row.total = measure(bench.steps());
      if (bench.selects()) row.choice = measure(bench.choices());
      bench.with_attention([&](const Meter::Variants& variants) { row.attention = measure(variants); });
      if (const Meter::Variants indexings = bench.indexings(); !indexings.empty() && phase == ReplayPhase::decode)
        row.index = measure(indexings);
      if (dense && dense->total) row.speedup = dense->total->median_us / row.total->median_us;
    });
  }

 private:
  /// A row with what `fill` finds out; a failure leaves its error alone.
  template <class F>
  CostRow timed(int cell, ReplayPhase phase, F fill) {
    CostRow row;
    row.cell = cell;
    row.phase = phase;
    row.tokens = layer_.tokens();
    row.before = meter_.clocks();
    try {
      CostRow filled = row;
      fill(filled);
      row = std::move(filled);
      row.lower_bound_us = lower_bound_us(row.bytes, row.flops, meter_.peaks);
    } catch (const std::exception& e) {
      row.error = e.what();
    }
    row.after = meter_.clocks();
    return row;
  }

  Timing measure(const Meter::Variants& variants) const {
    TimingOptions how;
    how.runs = options_.samples;
    how.least_seconds = 0;
    how.most_seconds = kMostSeconds;
    Timing out = meter_.time(variants, how);
    out.launch_bound |= out.median_us < kLaunchBoundUs;
    return out;
  }

  int copies(ReplayPhase phase) const {
    return phase == ReplayPhase::decode ? copies_needed(layer_.kv_bytes(), meter_.peaks.l2_bytes) : 1;
  }
  double attention_flops(double pairs) const { return 4.0 * layer_.layer().head_dim * pairs; }
  bool keeps_dense(const Cell& cell, ReplayPhase phase) const {
    const auto& role = phase != ReplayPhase::evict && cell.select ? cell.select : cell.evict;
    return role && role->keeps_dense(layer_.layer().index);
  }

  const CostOptions& options_;
  const Meter& meter_;
  TimedLayer layer_;
};

/// Cells that act in the phase, of those that differ in their seed alone the first.
std::vector<int> cells_to_time(const std::vector<Cell>& cells, ReplayPhase phase) {
  std::vector<int> out;
  std::vector<Json> known;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    if (!why_skipped(cells[i], phase).empty()) continue;
    Json settings = cells[i].describe();
    settings.erase("seed");
    if (std::find(known.begin(), known.end(), settings) != known.end()) continue;
    known.push_back(std::move(settings));
    out.push_back(static_cast<int>(i));
  }
  return out;
}

}  // namespace

double lower_bound_us(double bytes, double flops, const DevicePeaks& peaks) {
  const double by_memory = peaks.read_gb_s > 0 ? bytes / (peaks.read_gb_s * 1e9) : 0;
  const double by_products = peaks.gemm_tflop_s > 0 ? flops / (peaks.gemm_tflop_s * 1e12) : 0;
  return 1e6 * std::max(by_memory, by_products);
}

CostResult time_cells_with(const Trace& trace, const std::vector<Cell>& cells, const CostOptions& options,
                           const CostRun& run, const Meter& meter) {
  CostResult result;
  result.options = options;
  result.peaks = meter.peaks;
  result.device = run.device->describe();
  const auto add = [&](CostRow row) {
    if (run.on_row) run.on_row(row);
    result.rows.push_back(std::move(row));
  };
  const int index = layer_to_time(trace.info(), cells);
  for (const i64 tokens : options.shape.tokens) {
    try {
      const MemoryPlan memory =
          timing_memory(options, tokens, run.page_size, meter.peaks.l2_bytes, run.device->on_device());
      result.memory.push_back(fmt::format("{} tokens: {}", tokens, memory.describe()));
      memory.require(meter.free_bytes(), fmt::format("[cost] shape, {} tokens", tokens));
      TiledLayer tiled = tile_layer(trace, index, options.shape, tokens, options.dtype);
      result.source = tiled.source;
      LengthRun length(tiled, tokens, options, run, meter);
      tiled = {};  // a gigabyte at 128K tokens
      for (const ReplayPhase phase : options.phases) {
        const std::vector<int> timed = cells_to_time(cells, phase);
        if (timed.empty()) continue;
        std::optional<CostRow> dense;
        if (phase != ReplayPhase::evict) add(*(dense = length.dense(phase)));
        for (const int cell : timed) {
          if (run.stop && run.stop()) return result;
          add(length.cell(cells[static_cast<std::size_t>(cell)], cell, phase, dense ? &*dense : nullptr));
        }
      }
    } catch (const std::exception& e) {  // this length cannot be timed at all; another one may
      CostRow row;
      row.tokens = tokens;
      row.phase = *options.phases.begin();
      row.error = e.what();
      add(std::move(row));
    }
  }
  return result;
}

CostResult time_cells(const Trace& trace, const std::vector<Cell>& cells, const CostOptions& options,
                      const CostRun& run) {
  Device& device = *run.device;
  Meter meter;
  try {
    meter.peaks = measure_peaks(device);
  } catch (const lacuna::Error& e) {  // too little memory for it: the study's tables are worth having all the same
    CostResult result;
    result.options = options;
    result.device = device.describe();
    CostRow row;
    row.error = e.what();
    result.rows.push_back(std::move(row));
    return result;
  }
  meter.clocks = [] { return read_clocks(0); };
  meter.free_bytes = [&device] { return device.free_bytes(); };
  // Flushed besides: a sparse step touches less of its copy than the L2 cache holds.
  meter.time = [&device](const Meter::Variants& variants, const TimingOptions& how) {
    return time_work(device, variants, true, how);
  };
  return time_cells_with(trace, cells, options, run, meter);
}

}  // namespace lacuna
