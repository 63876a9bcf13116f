// Rows made by hand, so that what a table must say is known.
#pragma once

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "lacuna/report/render.hpp"
#include "study/scenario_file.hpp"

namespace lacuna::testing {

/// A metric with a head for each value, every sample that value, and 8 blocks of 8 queries.
inline LayerStats constant(const std::string& metric, const std::vector<float>& values, sdk::i64 queries = 64) {
  Samples s{static_cast<sdk::i32>(values.size()), queries, {}};
  for (const float value : values) s.value.insert(s.value.end(), static_cast<std::size_t>(queries), value);
  return collect(find_metric(metric), s, make_blocks(queries, 8, {}));
}
inline LayerStats constant(const std::string& metric, float value) { return constant(metric, std::vector{value}); }

/// A study of the scenario's cells on traces of 100 + 64 tokens and two layers (0 and 9) of 10.
class MadeStudy {
 public:
  explicit MadeStudy(const std::string& scenario, std::vector<std::string> models = {"m"}) {
    study.scenario = parse(scenario);
    for (std::size_t i = 0; i < models.size(); ++i) {
      TraceFacts t;
      t.file = "t" + std::to_string(i);
      t.id = "id" + std::to_string(i);
      t.model = models[i];
      t.num_layers = 10;
      t.captured_layers = {0, 9};
      t.prefill_tokens = 100;
      t.decode_tokens = 64;
      study.traces.push_back(t);
    }
  }

  /// A row of `mass_kept` = value, lse_error = value - 1 and output_rel_l2 = 1 - value.
  Row& add(int cell, ReplayPhase phase, int layer, float value, std::size_t trace = 0) {
    Row row;
    row.cell = cell;
    row.trace = study.traces[trace].file;
    row.trace_id = study.traces[trace].id;
    row.model = study.traces[trace].model;
    row.layer = layer;
    row.phase = phase;
    row.metrics["mass_kept"] = constant("mass_kept", value);
    row.metrics["lse_error"] = constant("lse_error", value - 1);
    row.metrics["output_rel_l2"] = constant("output_rel_l2", cell < 0 ? 0.002f : 1 - value);
    row.realised_head = row.realised_union = row.target_share = 0.5;
    if (cell >= 0) row.nominal = study.scenario.cells[static_cast<std::size_t>(cell)].density(phase);
    row.cost.dense_kv_bytes = 100;
    row.cost.kv_bytes = 40;
    row.cost.index_bytes = 10;
    row.cost.touched_bytes = 50;
    row.cost.seconds = 1;
    study.rows.push_back(row);
    return study.rows.back();
  }
  /// The same value in both layers, and a noise floor once for each (phase, layer, trace).
  void add_both(int cell, ReplayPhase phase, float value, std::size_t trace = 0) {
    for (const int layer : {0, 9}) add(cell, phase, layer, value, trace);
  }

  StudyResult study;
};

inline std::vector<std::string> labels_of(const std::vector<Line>& lines) {
  std::vector<std::string> out;
  for (const Line& line : lines) out.push_back(line.label);
  return out;
}

inline bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace lacuna::testing
