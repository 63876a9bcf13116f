// What `lacuna calibrate` writes and a parameter of type data names: arrays by model layer and name, with where they
// come from.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "lacuna/sdk/types.hpp"

namespace lacuna {

/// Whether a comma-separated list of content ids names this one.
bool names_id(const std::string& list, const std::string& id);

struct CalibrationArray {
  std::vector<sdk::i64> shape;  // at most 3
  std::vector<float> values;    // row-major
};

struct CalibrationFile {
  std::map<int, std::map<std::string, CalibrationArray>> layers;
  std::map<std::string, std::string> metadata;  // strategy, parameters, model, trace_ids (comma-separated), ...
  std::string content_id;                       // hash of the arrays, 16 hex digits: the same in either encoding

  /// Null where there is none.
  const CalibrationArray* find(int layer, const std::string& name) const;
  /// Whether it was made from the trace with this content id.
  bool made_from(const std::string& trace_id) const;
  /// Computes content_id.
  void identify();
};

/// Reads a .safetensors file (tensors `layers.{i}.{name}`, fp32) or, by any other name, TOML: `[layer.3] name = [...]`,
/// lists nested up to three deep, and texts under [metadata]. Throws Error.
CalibrationFile read_calibration(const std::string& path);
/// Writes one or the other by the name's end, atomically. Throws Error.
void write_calibration(const CalibrationFile& file, const std::string& path);

}  // namespace lacuna
