// Parts of the shipped trace as files of their own, which tests then spoil.
#pragma once

#include <unistd.h>

#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "lacuna/trace/safetensors.hpp"
#include "scratch_directory.hpp"

namespace lacuna::testing {

/// Layers 9 and 27 of the shipped trace, its first 320 tokens: 288 of a prompt that ends in a question of 32, then an
/// answer of 32.
struct SmallTrace {
  static constexpr sdk::i64 kTokens = 320;
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::vector<std::byte>> storage;

  SmallTrace() : shipped_(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors") {
    metadata = shipped_.metadata();
    metadata["captured_layers"] = "9,27";
    metadata["softmax_scale"] = R"({"9": 0.125, "27": 0.125})";
    metadata["sliding_window"] = R"({"9": null, "27": null})";
    metadata["prefill_tokens"] = "288";
    metadata["decode_tokens"] = "32";
    metadata["segments"] =
        R"([{"name": "context", "begin": 0, "end": 256}, {"name": "question", "begin": 256, "end": 288},
                               {"name": "answer", "begin": 288, "end": 320}])";
    copy("tokens", 0, 1);
    for (const std::string layer : {"layers.9.", "layers.27."}) {
      for (const char* name : {"q", "k", "v"}) copy(layer + name, 1, shipped_.tensors().at(layer + name).shape[0]);
      tensors[layer + "wo"] = shipped_.tensors().at(layer + "wo");
    }
  }

  void write(const std::string& path) const { write_safetensors(path, tensors, metadata); }

 private:
  /// The first tokens of [heads, T, ...]; `axis` is where T stands.
  void copy(const std::string& name, std::size_t axis, sdk::i64 heads) {
    StoredTensor t = shipped_.tensors().at(name);
    const sdk::i64 head_bytes = t.bytes() / heads, kept = head_bytes / t.shape[axis] * kTokens;
    std::vector<std::byte>& bytes = storage[name];
    bytes.resize(static_cast<std::size_t>(heads * kept));
    for (sdk::i64 h = 0; h < heads; ++h)
      std::memcpy(bytes.data() + h * kept, static_cast<const std::byte*>(t.data) + h * head_bytes,
                  static_cast<std::size_t>(kept));
    t.shape[axis] = kTokens;
    t.data = bytes.data();
    tensors[name] = t;
  }

  SafetensorsFile shipped_;
};

}  // namespace lacuna::testing
