// Traces: Q, K, V recorded from a real model, one safetensors file each (format lacuna-trace, version 1).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/sdk/types.hpp"
#include "lacuna/trace/rope.hpp"

namespace lacuna {

struct Segment {
  std::string name;  // context | needle | question | answer
  sdk::i64 begin, end;
};

struct TraceInfo {
  std::string path, model;
  std::vector<int> captured_layers;  // ascending
  int num_layers = 0, num_qo_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::map<int, float> softmax_scale;      // by captured layer
  std::map<int, sdk::i64> sliding_window;  // by captured layer; 0: none (a trace in memory may leave layers out)
  std::map<int, RopeConfig> rope;          // by captured layer; a trace in memory may leave out default ones
  bool mixed_layers = false;               // the model has layers of both kinds, full and with a sliding window
  bool rope_applied = true;
  sdk::i64 prefill_tokens = 0, decode_tokens = 0;
  std::vector<Segment> segments;
  std::map<std::string, std::string> provenance;  // every other metadata field

  sdk::i64 tokens() const { return prefill_tokens + decode_tokens; }
  /// The first segment of that name, if any.
  std::optional<Segment> segment(const std::string& name) const;
  /// Facts of a captured layer; throws Error for one that was not captured.
  sdk::Layer layer(int index) const;
};

/// A read-only tensor: mapped from the file, or owned by the trace. Row-major, contiguous.
struct Tensor {
  const void* data = nullptr;
  sdk::Dtype dtype = sdk::Dtype::f32;
  std::vector<sdk::i64> shape;

  bool present() const { return data != nullptr; }
  sdk::i64 elements() const;
};

struct LayerTensors {
  Tensor q;      // [num_qo_heads, T, head_dim] after RoPE
  Tensor k, v;   // [num_kv_heads, T, head_dim]
  Tensor wo;     // [d_model, num_qo_heads * head_dim], or absent
  Tensor k_pre;  // [num_kv_heads, T, head_dim] before RoPE, or absent
};

class Trace {
 public:
  /// Maps the file and checks the header, every offset, shape, dtype, metadata field and segment. Nothing of a layer is
  /// read before layer(). K and V of a layer must have one dtype. Tensors that the format does not name are ignored.
  /// Throws Error.
  static Trace open(const std::string& path);
  /// A trace in memory (tests, `lacuna check`): tensors by their names in the file, validated like a file and kept as
  /// `dtype` (f32 or bf16, rounded to nearest even). `tokens` may be left out (then every id is 0).
  static Trace from_memory(TraceInfo info,
                           std::map<std::string, std::pair<std::vector<sdk::i64>, std::vector<float>>> tensors,
                           sdk::Dtype dtype = sdk::Dtype::f32);

  const TraceInfo& info() const;
  /// The layer's tensors, valid as long as the trace. Checks that their values are finite on the way (throws Error
  /// naming tensor, head and token). Asking for another layer gives the memory of the last one back; its tensors stay
  /// valid.
  LayerTensors layer(int index) const;
  /// The same without a look at the values: for shapes and types.
  LayerTensors unchecked_layer(int index) const;
  std::vector<sdk::i32> tokens() const;
  /// Hash of the file's bytes (of the tensors' for a trace in memory), 16 hex digits; computed once.
  const std::string& content_id() const;

 private:
  struct Impl;
  explicit Trace(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<Impl> impl_;
};

/// What a synthetic trace looks like: keys with a few attention sinks and heavy tokens, seeded.
struct SyntheticSpec {
  int num_qo_heads = 4, num_kv_heads = 2, head_dim = 64;
  sdk::i64 prefill_tokens = 256, decode_tokens = 8;
  std::vector<int> captured_layers = {0};
  int num_layers = 4;
  bool with_wo = false;
  std::uint64_t seed = 0;
  sdk::Dtype dtype = sdk::Dtype::f32;  // or bf16
};
Trace synthetic_trace(const SyntheticSpec& spec);

}  // namespace lacuna
