#include "lacuna/replay/trace_summary.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lacuna/attention/attention.hpp"
#include "lacuna/kv/kv_cache.hpp"
#include "lacuna/ops/tile.hpp"
#include "lacuna/pipeline/runtime.hpp"

namespace lacuna {
using namespace sdk;

namespace {
constexpr i64 kSinks = 4, kRecent = 64;
constexpr i64 kQueries = 64;  // of a tile
static_assert(kQueries == Tile::kLanes);

/// Sums over queries.
struct Sums {
  double entropy = 0, sinks = 0, recent = 0;
  double max_logit = -std::numeric_limits<double>::infinity();
  i64 long_queries = 0;

  void merge(const Sums& o) {
    entropy += o.entropy;
    sinks += o.sinks;
    recent += o.recent;
    max_logit = std::max(max_logit, o.max_logit);
    long_queries += o.long_queries;
  }
};

/// Queries [begin, end) of one head: two passes over their keys, for the lse and for the probabilities.
Sums summarize(Tile& tile, const Paged& kv, const Queries& q, const Layer& layer, const TileQueries& which) {
  Sums out;
  const KeyList keys = dense_keys(kv, which.kv_row, which.begin, which.end, layer.sliding_window);
  std::vector<i32> slots;
  for (i64 i = which.begin; i < which.end; ++i) slots.push_back(static_cast<i32>(i));
  tile.load_queries(q, which, slots, layer.softmax_scale);
  const auto each_block = [&](auto&& f) {
    for (i64 k = 0; k < keys.size(); k += Tile::kKeys) {
      const int n = static_cast<int>(std::min<i64>(Tile::kKeys, keys.size() - k));
      tile.load_keys(kv, keys, k, n, false);
      f(k, n);
    }
  };
  each_block([&](i64, int) { tile.online(0); });
  const std::vector<double> lse = tile.finish();
  each_block([&](i64 k, int n) {
    tile.probabilities(0);
    const float* p = tile.probability();
    for (int j = 0; j < n; ++j) {
      const i32 slot = keys.slot[static_cast<std::size_t>(k + j)];
      for (i64 i = 0; i < which.count(); ++i) {
        const double mass = p[j * tile.width(0) + i];
        if (mass <= 0) continue;  // masked, or beyond what fp32 tells from 0: p ln p is 0 too
        // Entropy is lse - sum p * logit with logit = ln p + lse.
        const double log_p = std::log(mass);
        out.entropy -= mass * log_p;
        out.max_logit = std::max(out.max_logit, log_p + lse[static_cast<std::size_t>(i)]);
        if (slots[static_cast<std::size_t>(i)] < kRecent) continue;
        if (slot < kSinks) out.sinks += mass;
        if (slots[static_cast<std::size_t>(i)] - slot < kRecent) out.recent += mass;
      }
    }
  });
  for (const i32 s : slots) out.long_queries += s >= kRecent;
  return out;
}
}  // namespace

LayerSummary summarize_layer(const Trace& trace, int layer_index) {
  constexpr i32 kPage = 16;
  const TraceInfo& info = trace.info();
  const Layer layer = info.layer(layer_index);
  const LayerTensors tensors = trace.layer(layer_index);
  const i64 n = info.prefill_tokens, tiles = (n + kQueries - 1) / kQueries;
  const auto pool = std::make_shared<PagePool>(cpu_device(), kPage, layer.head_dim, tensors.k.dtype,
                                               layer.num_kv_heads * ((n + kPage - 1) / kPage), false);
  KvCache cache(pool, layer.num_kv_heads, n);
  cache.append(tensors.k.data, tensors.v.data, tensors.k.dtype, info.tokens() * layer.head_dim, n, 0);
  const Paged kv = cache.view();
  const Queries q = QuerySource{tensors.q.data, tensors.q.dtype, info.tokens()}.span(layer, 0, n);

  std::vector<Sums> of_task(static_cast<std::size_t>(layer.num_qo_heads * tiles));
#pragma omp parallel
  {
    Tile tile;
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < layer.num_qo_heads * tiles; ++task) {
      const i32 head = static_cast<i32>(task % layer.num_qo_heads);
      const i64 begin = task / layer.num_qo_heads * kQueries;
      of_task[static_cast<std::size_t>(task)] =
          summarize(tile, kv, q, layer, {0, begin, std::min(begin + kQueries, n), head, 1, head / layer.group()});
    }
  }
  Sums all;
  for (const Sums& s : of_task) all.merge(s);
  LayerSummary out;
  out.layer = layer_index;
  out.entropy = all.entropy / static_cast<double>(layer.num_qo_heads * n);
  if (all.long_queries > 0) {
    out.sink_mass = all.sinks / static_cast<double>(all.long_queries);
    out.recent_mass = all.recent / static_cast<double>(all.long_queries);
  }
  out.max_logit = all.max_logit;
  return out;
}

}  // namespace lacuna
