// 64-bit content hash for identities in rows: XXH64 (Collet, xxHash specification 0.1.1); not cryptographic. Its four
// lanes hash a mapped file at memory speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lacuna {

class Hasher {
 public:
  /// XXH64 of the bytes, seeded with the value so far (0 at first): two adds are not one add of the joined bytes.
  Hasher& add(const void* data, std::size_t bytes);
  Hasher& add(const std::string& text);
  std::uint64_t value() const { return state_; }
  std::string hex() const;  // 16 lower-case digits

 private:
  std::uint64_t state_ = 0;
};

}  // namespace lacuna
