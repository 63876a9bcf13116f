// 64-bit content hash (FNV-1a over 8-byte words, finished by a mix), for identities in rows; not cryptographic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lacuna {

class Hasher {
 public:
  Hasher& add(const void* data, std::size_t bytes);
  Hasher& add(const std::string& text);  // length, then bytes
  std::uint64_t value() const;
  std::string hex() const;  // 16 lower-case digits

 private:
  std::uint64_t state_ = 0xcbf29ce484222325ull;
};

}  // namespace lacuna
