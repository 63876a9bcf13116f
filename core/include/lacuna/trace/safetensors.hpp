// The safetensors container: 8 bytes header length (little-endian), a JSON header, then the tensors' bytes without
// gaps.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "lacuna/sdk/types.hpp"

namespace lacuna {

enum class StoredType { f32, f16, bf16, i32, i64 };
sdk::i64 size_of(StoredType type);
/// As the header spells it: "F32", "BF16", ...
const char* name_of(StoredType type);

/// Row-major, contiguous. `data` is not owned.
struct StoredTensor {
  StoredType type = StoredType::f32;
  std::vector<sdk::i64> shape;  // empty: a scalar
  const void* data = nullptr;

  sdk::i64 elements() const;
  sdk::i64 bytes() const;
};

/// A mapped file. The constructor reads the header alone and checks it whole: its length, its JSON, every dtype, shape
/// and offset, and that the tensors fill the rest of the file without gap or overlap. Throws Error.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  /// The whole file, header included.
  std::span<const std::byte> bytes() const { return {base_, size_}; }
  /// Gives the pages of a range back to the system; they are read again from the file when next touched.
  void release(const void* data, std::size_t bytes) const noexcept;

 private:
  void map(const std::string& path);
  void read_header(const std::string& path);

  const std::byte* base_ = nullptr;
  std::size_t size_ = 0;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, StoredTensor> tensors_;
};

/// Writes the file atomically: a temporary file beside it, then a rename, so that a reader never sees half of it.
/// Larger element types come first, each kind by name, so that every tensor is aligned. Throws Error.
void write_safetensors(const std::string& path, const std::map<std::string, StoredTensor>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace lacuna
