// Lloyd's k-means (Lloyd 1982, "Least squares quantization in PCM") on cached keys, the same on any number of threads:
// sums are in double and in the order of slots, ties go to the lower cluster, an empty cluster keeps its centroid.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

struct IndexRange {
  i64 begin, end;
  LACUNA_HD bool holds(i64 i) const { return begin <= i && i < end; }
  LACUNA_HD i64 size() const { return end > begin ? end - begin : 0; }
};

enum class Affinity : i32 { distance, product };  // the least Euclidean distance, or the largest inner product

/// The keys of a row in `parts` equal runs of channels, each clustered by itself. `Cut` says which tokens share which
/// clusters, for a lambda:
///   i64 clusters                             of a row
///   IndexRange tokens(i64 row)               all slots that are clustered
///   IndexRange tokens_of(i64 row, i64 cluster)
///   IndexRange clusters_of(i64 row, i64 slot)
template <class Code, class Cut>
struct KeyClusters {
  Paged kv;
  Cut cut;
  i64 parts;
  Affinity affinity;
  float* centroid;      // [rows, clusters, head_dim]
  SideView<Code> code;  // per token [parts]: the cluster in its row

  /// The cluster that a key is nearest to.
  LACUNA_HD i64 nearest(i64 row, i64 slot, i64 part) const {
    constexpr i32 kAtOnce = 8;
    const i64 d = kv.head_dim, width = d / parts, at = kv.physical(row, slot) * d + part * width;
    const IndexRange in = cut.clusters_of(row, slot);
    i64 best = in.begin;
    double least = INFINITY;
    for (i64 first = in.begin; first < in.end; first += kAtOnce) {
      const float* mean = centroid + (row * cut.clusters + first) * d + part * width;
      const i64 there = in.end - first;
      double sum[kAtOnce] = {};
      for (i64 e = 0; e < width; ++e) {
        const double x = load(kv.k, kv.dtype, at + e);
        for (i32 n = 0; n < kAtOnce; ++n) {
          const double y = n < there ? mean[n * d + e] : 0.f;
          sum[n] += affinity == Affinity::distance ? (x - y) * (x - y) : -x * y;
        }
      }
      for (i32 n = 0; n < kAtOnce; ++n)
        if (n < there && sum[n] < least) {
          least = sum[n];
          best = first + n;
        }
    }
    return best;
  }
};

/// Centroid j of m that share n tokens starts as key floor(j * n / m) of them.
template <class Code, class Cut>
void start_evenly(Context& c, const KeyClusters<Code, Cut>& of) {
  const i64 d = of.kv.head_dim, clusters = of.cut.clusters;
  c.for_each(of.kv.rows * clusters * d, [=] LACUNA_HD(i64 i) {
    const i64 cluster = i / d % clusters, row = i / d / clusters;
    const IndexRange tokens = of.cut.tokens_of(row, cluster);
    if (tokens.size() == 0) return;
    const IndexRange together = of.cut.clusters_of(row, tokens.begin);
    const i64 slot = tokens.begin + (cluster - together.begin) * tokens.size() / together.size();
    of.centroid[i] = of.kv.key(row, slot, i % d);
  });
}

/// Every token to its nearest cluster.
template <class Code, class Cut>
void assign_nearest(Context& c, const KeyClusters<Code, Cut>& of) {
  const i64 slots = of.kv.max_length, parts = of.parts;
  c.for_each(of.kv.rows * slots * parts, [=] LACUNA_HD(i64 i) {
    const i64 part = i % parts, slot = i / parts % slots, row = i / parts / slots;
    if (of.cut.tokens(row).holds(slot)) of.code.at(row, slot, part) = static_cast<Code>(of.nearest(row, slot, part));
  });
}

/// mean [rows, clusters, head_dim] of the clusters' members in `data`, the cache's keys or values.
template <class Code, class Cut>
void mean_of_members(Context& c, const KeyClusters<Code, Cut>& of, const void* data, float* mean) {
  constexpr i32 kLanes = 16;  // channels of a thread
  const i64 d = of.kv.head_dim, width = d / of.parts, lanes = (width + kLanes - 1) / kLanes;
  const i64 clusters = of.cut.clusters, pieces = of.parts * lanes;
  c.for_each(of.kv.rows * clusters * pieces, [=] LACUNA_HD(i64 i) {
    const i64 piece = i % pieces, cluster = i / pieces % clusters, row = i / pieces / clusters;
    const i64 part = piece / lanes, first = part * width + piece % lanes * kLanes, left = (part + 1) * width - first;
    const IndexRange tokens = of.cut.tokens_of(row, cluster);
    double sum[kLanes] = {};
    i64 members = 0;
    for (i64 slot = tokens.begin; slot < tokens.end; ++slot) {
      if (of.code.at(row, slot, part) != static_cast<Code>(cluster)) continue;
      ++members;
      const i64 at = of.kv.physical(row, slot) * d + first;
      for (i32 n = 0; n < kLanes; ++n)
        if (n < left) sum[n] += load(data, of.kv.dtype, at + n);
    }
    if (members == 0) return;
    for (i32 n = 0; n < kLanes && n < left; ++n)
      mean[(row * clusters + cluster) * d + first + n] = static_cast<float>(sum[n] / static_cast<double>(members));
  });
}

}  // namespace lacuna::sdk
