// A finished study as reports take it: what was run, on what, and every row.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "lacuna/replay/replay.hpp"
#include "lacuna/study/scenario.hpp"
#include "lacuna/trace/trace.hpp"

namespace lacuna {

/// What the program was built from and with. Nothing here changes between two runs.
struct BuildFacts {
  std::string version, commit, compiler, flags, cuda;
};

struct TraceFacts {
  std::string file, id, model;  // file name, content hash
  std::string context;          // traces with the same one share a context; may be empty
  int num_layers = 0, num_qo_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::vector<int> captured_layers;
  std::map<int, std::int64_t> sliding_window;  // of the captured layers that have one
  bool mixed_layers = false;                   // TraceInfo::mixed_layers
  std::int64_t prefill_tokens = 0, decode_tokens = 0;
};
TraceFacts facts_of(const Trace& trace);

struct StudyResult {
  Scenario scenario;
  std::string device;  // Device::describe()
  BuildFacts build;
  std::vector<TraceFacts> traces;
  std::vector<Row> rows;           // of all traces; Row::cell counts scenario.cells
  std::vector<Skip> skips;         // of all traces; the same one may stand several times
  std::optional<CostResult> cost;  // of the first trace; where a GPU was timed
  bool interrupted = false;
};

}  // namespace lacuna
