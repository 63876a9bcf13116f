// Rows pooled into comparison tables: one per model, phase, cut and budget; in decode, cells that evict and then
// select have tables of their own, one per pair of budgets.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "lacuna/report/study_result.hpp"

namespace lacuna {

/// One metric of one line: over layers and seeds within a trace (fixed effects), then over the model's traces.
struct PooledMetric {
  double mean = 0;
  double p1 = 0;            // of each seed's samples, then the mean over seeds
  double worst_head = 0;    // of the heads' means over seeds
  std::string worst_trace;  // where the worst head is
  int worst_layer = 0, worst_head_index = -1;
  std::optional<double> answer_mean;
  std::optional<Interval> interval;  // one trace: across its stretches of text; several: across prompts
  std::string note;                  // why there is none
  std::int64_t queries = 0, blocks = 0, undefined = 0;
};

/// A method in a table: the cells that differ in their seeds, or only in roles that do not act in this phase.
struct Line {
  std::string label;
  std::vector<int> cells;            // empty: the noise floor
  std::vector<std::uint64_t> seeds;  // that were pooled
  std::vector<int> layers;           // that were pooled, of every trace
  std::map<std::string, PooledMetric> metrics;
  std::optional<double> target;  // the share asked for, from the rows
  /// Share of the pairs (evict: of the tokens before the cut) over the captured layers that are sparse: of a layer over
  /// its seeds and traces by their pairs, then the mean of the layers, which in a model have equal pairs.
  double realised_head = 1, realised_union = 1;
  /// The same over all layers of the model: the dense ones at 1, sliding-window layers at the pairs of their window.
  /// Layers not captured are taken to be like those that are; none where the model mixes kinds of which one alone was
  /// captured.
  std::optional<double> realised_head_all, realised_union_all;
  bool selects = false;                                           // has a select role
  double read_share = 1;                                          // of the pairs that dense attention reads
  std::optional<double> index_share, pages_share, touched_share;  // of dense K + V bytes; of what `dense` fetched
  std::set<std::string> marks;                                    // of its rows, and "partial" when layers are missing
  std::string left_out;                                           // why it is not compared; empty in the comparison
};

struct Table {
  std::string model;
  ReplayPhase phase = ReplayPhase::prefill;
  std::string cut;     // evict
  std::string budget;  // "density 0.2", "tokens 256", "own budget", "evict density 0.5 × density 0.2"
  std::optional<double> density;
  bool compound = false;  // decode: selections from what an eviction left; `density` is of that
  std::vector<std::string> traces;
  std::vector<int> layers;              // compared, the same for every method
  std::map<std::string, double> noise;  // mean distance from the exact dense value by metric; empty without one
  Line noise_line;
  std::vector<Line> lines;                                                      // by mass_kept, best first
  std::vector<Line> left_out;                                                   // by label
  std::int64_t queries = 0, blocks = 0, left_out_queries = 0, min_context = 0;  // largest over the traces
  std::vector<std::string> notes;
};

/// What a metric is where attention is exactly dense: 1 for mass_kept and output_cosine, else 0.
double dense_value(const std::string& metric);

/// Tables in the order of models, phases, cuts and budgets (densities ascending, other budgets, own budgets last; after
/// each the pairs of budgets that end in it). Failed rows are in none. A layer that one method keeps dense is left out
/// for all methods of a table.
std::vector<Table> tabulate(const StudyResult& study);

}  // namespace lacuna
