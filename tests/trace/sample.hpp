// A small valid trace to spoil, and files that vanish with the test.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "lacuna/base/error.hpp"
#include "lacuna/trace/safetensors.hpp"
#include "lacuna/trace/trace.hpp"
#include "scratch_directory.hpp"

namespace lacuna::testing {

/// Checks that f throws Error and that its text holds every part.
template <class F>
void check_error(F f, const std::vector<std::string>& parts) {
  std::string text;
  try {
    f();
  } catch (const Error& e) {
    text = e.what();
  }
  INFO("error: ", text);
  REQUIRE_FALSE(text.empty());
  for (const std::string& part : parts) {
    CAPTURE(part);
    CHECK(text.find(part) != std::string::npos);
  }
}

/// Layers 1 (sliding window 4) and 3 of 5, 4 query heads on 2 KV heads, head_dim 8, 6 + 2 tokens.
struct SampleTrace {
  static constexpr sdk::i64 kTokens = 8, kQoHeads = 4, kKvHeads = 2, kHeadDim = 8, kModelDim = 10;

  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::vector<std::byte>> storage;

  SampleTrace() {
    metadata = {
        {"format", "lacuna-trace"},
        {"version", "1"},
        {"model", "sample"},
        {"captured_layers", "1,3"},
        {"num_layers", "5"},
        {"num_qo_heads", "4"},
        {"num_kv_heads", "2"},
        {"head_dim", "8"},
        {"softmax_scale", R"({"1": 0.25, "3": 0.5})"},
        {"sliding_window", R"({"1": 4, "3": null})"},
        {"rope", R"({"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}})"},
        {"rope_applied", "true"},
        {"prefill_tokens", "6"},
        {"decode_tokens", "2"},
        {"segments", R"([{"name": "context", "begin": 0, "end": 6}, {"name": "answer", "begin": 6, "end": 8}])"},
        {"context_id", "genesis"},
        {"shared_prefix", "5"}};
    put("tokens", StoredType::i32, {kTokens});
    for (const char* layer : {"layers.1.", "layers.3."}) {
      put(std::string(layer) + "q", StoredType::bf16, {kQoHeads, kTokens, kHeadDim});
      put(std::string(layer) + "k", StoredType::bf16, {kKvHeads, kTokens, kHeadDim});
      put(std::string(layer) + "v", StoredType::bf16, {kKvHeads, kTokens, kHeadDim});
    }
    put("layers.3.wo", StoredType::f32, {kModelDim, kQoHeads * kHeadDim});
    put("layers.3.k_pre", StoredType::f16, {kKvHeads, kTokens, kHeadDim});
  }

  /// Adds or replaces a tensor; its bytes are below 64, so that every float is finite and every token non-negative.
  void put(const std::string& name, StoredType type, std::vector<sdk::i64> shape) {
    StoredTensor tensor{type, std::move(shape), nullptr};
    std::vector<std::byte>& bytes = storage[name];
    bytes.resize(static_cast<std::size_t>(tensor.bytes()));
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>((7 * i + name.size()) % 64);
    tensor.data = bytes.data();
    tensors[name] = tensor;
  }

  template <class T>
  void set(const std::string& name, std::size_t element, T value) {
    std::memcpy(storage.at(name).data() + element * sizeof(T), &value, sizeof(T));
  }

  void write(const std::string& path) const { write_safetensors(path, tensors, metadata); }
};

}  // namespace lacuna::testing
