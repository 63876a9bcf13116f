// What a run needs of a device's memory, added up and stated before it starts.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace lacuna {

class MemoryPlan {
 public:
  /// Parts of the same name are one part.
  void add(std::string what, std::size_t bytes);
  /// Saturates instead of overflowing.
  std::size_t total() const;
  /// "2.25 GiB: KV pages 2.00 GiB, scores 256.0 MiB", largest first, parts of 0 bytes left out; "nothing" for none.
  std::string describe() const;
  /// Throws Error with the needed and the free bytes and the largest parts when total() exceeds `free_bytes`.
  void require(std::size_t free_bytes, const std::string& where) const;

 private:
  std::string largest(std::size_t most) const;
  std::vector<std::pair<std::string, std::size_t>> parts_;
};

/// "1023 bytes", "1.5 KiB", "256.0 MiB", "2.25 GiB".
std::string bytes_text(std::size_t bytes);

}  // namespace lacuna
