// What a study's methods cost in time on a GPU: a pass of its own after the replay, on a layer of the size that a
// server would have, with checks, metrics and accounting off. The columns are explained in docs/metrics.md.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "lacuna/device/clocks.hpp"
#include "lacuna/device/peaks.hpp"
#include "lacuna/device/timing.hpp"
#include "lacuna/replay/row.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// The layer that is timed.
struct CostShape {
  sdk::i32 num_qo_heads = 32, num_kv_heads = 8, head_dim = 128;
  std::vector<sdk::i64> tokens = {32768};  // each one a layer of its own
};

struct CostOptions {
  bool wanted = false;
  CostShape shape;
  sdk::Dtype dtype = sdk::Dtype::bf16;  // of queries and cache; bf16 or f16
  std::set<ReplayPhase> phases = {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode};
  int samples = 30;  // of every time but an eviction's
};

/// One method in one phase at one length, or dense attention there.
struct CostRow {
  int cell = -1;  // -1: dense attention
  ReplayPhase phase = ReplayPhase::decode;
  sdk::i64 tokens = 0;
  std::string error;            // empty unless it failed
  std::string untimed;          // why there can be no time though nothing failed, or empty
  std::optional<Timing> total;  // choose and attend; evict: score, allocate and compact, the host's part included
  std::optional<Timing> choice, attention;  // of a selection, each alone
  std::optional<Timing> index;              // side data of one appended token
  double bytes = 0, flops = 0;     // that `total` cannot do without: attention's, and those charged by the choice
  double lower_bound_us = 0;       // lower_bound_us() of them
  std::optional<double> speedup;   // dense attention's time over total
  std::vector<std::string> flags;  // clairvoyant, dense-layer, evicts-while-decoding
  std::optional<Clocks> before, after;
};

struct CostResult {
  CostOptions options;
  DevicePeaks peaks{};
  std::string device, source;       // source: where the timed layer's tensors come from
  std::vector<std::string> memory;  // stated before each length: "32768 tokens: 2.25 GiB: ..."
  std::vector<CostRow> rows;        // by tokens, phase, cell; dense attention first
};

/// max(bytes / read bandwidth, FLOPs / matrix product rate) of the device's own peaks, in us; a peak of 0 bounds
/// nothing.
double lower_bound_us(double bytes, double flops, const DevicePeaks& peaks);

struct CostRun {
  sdk::i32 page_size = 16;
  std::shared_ptr<Device> device;              // a GPU
  std::function<void(const CostRow&)> on_row;  // progress: once per finished row
  std::function<bool()> stop;                  // asked between rows; true ends the pass early
};

/// Times every cell that acts in a phase of `options`, those that differ in their seed alone once, on one layer made
/// from the trace: the captured layer in the middle of those that no cell keeps dense and that have no sliding window.
/// A cell that fails, or does not fit into memory, has a row with its error and the others go on; where
/// the peaks cannot be measured, that error is the only row. `options` as a scenario gives them.
CostResult time_cells(const Trace& trace, const std::vector<Cell>& cells, const CostOptions& options,
                      const CostRun& run);

}  // namespace lacuna
