// What a trace holds, layer by layer: for `lacuna trace FILE`.
#pragma once

#include <vector>

#include "lacuna/trace/trace.hpp"

namespace lacuna {

struct LayerSummary {
  int layer = 0;
  double entropy = 0;      // nats, mean over heads and prompt queries, of the dense attention row
  double sink_mass = 0;    // mean mass on the first 4 tokens, over queries that see more than 64
  double recent_mass = 0;  // mean mass on the 64 newest tokens, the same queries
  double max_logit = 0;    // largest scaled logit
};

/// Dense attention statistics of a layer; streamed, nothing of size T^2 is stored.
LayerSummary summarize_layer(const Trace& trace, int layer);

}  // namespace lacuna
