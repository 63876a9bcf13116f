// `lacuna dump`: what a method chose on one layer, for comparison with other implementations.
#pragma once

#include <string>

#include "lacuna/replay/row.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

struct DumpOptions {
  ReplayPhase phase = ReplayPhase::prefill;
  int layer = 0;
  bool cells = false;   // also cells.indptr, cells.indices: the canonical token set of every row
  bool scores = false;  // also scores, as ranked (after the GQA reduction)
  bool check = false;
  bool allow_leak = false;  // as ReplayOptions
  sdk::i32 page_size = 16;
  std::shared_ptr<Device> device = cpu_device();
};

/// Writes the safetensors file `path` (atomically). Tensors, rows and metadata: docs/dump.md. Throws Error for a cell
/// without a role in the phase, a strategy's failure, or a file that cannot be written.
void dump(const Trace& trace, const Cell& cell, const DumpOptions& options, const std::string& path);

}  // namespace lacuna
