#include "lacuna/device/budget.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

constexpr std::size_t kAll = SIZE_MAX;

std::size_t saturating_sum(std::size_t a, std::size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

}  // namespace

std::string bytes_text(std::size_t bytes) {
  const double b = static_cast<double>(bytes);
  if (bytes < (std::size_t{1} << 10)) return fmt::format("{} bytes", bytes);
  if (bytes < (std::size_t{1} << 20)) return fmt::format("{:.1f} KiB", b / (1 << 10));
  if (bytes < (std::size_t{1} << 30)) return fmt::format("{:.1f} MiB", b / (1 << 20));
  return fmt::format("{:.2f} GiB", b / (1 << 30));
}

void MemoryPlan::add(std::string what, std::size_t bytes) {
  const auto same = std::find_if(parts_.begin(), parts_.end(), [&](const auto& part) { return part.first == what; });
  if (same != parts_.end()) {
    same->second = saturating_sum(same->second, bytes);
  } else {
    parts_.emplace_back(std::move(what), bytes);
  }
}

std::size_t MemoryPlan::total() const {
  std::size_t sum = 0;
  for (const auto& part : parts_) sum = saturating_sum(sum, part.second);
  return sum;
}

std::string MemoryPlan::describe() const {
  const std::string parts = largest(kAll);
  return parts.empty() ? "nothing" : fmt::format("{}: {}", bytes_text(total()), parts);
}

void MemoryPlan::require(std::size_t free_bytes, const std::string& where) const {
  constexpr std::size_t kNamed = 3;
  if (total() <= free_bytes) return;
  throw Error({"too little memory", fmt::format("{} (largest: {})", bytes_text(total()), largest(kNamed)),
               fmt::format("{} free", bytes_text(free_bytes)), where,
               "Use a shorter trace, fewer workers, or a GPU with more free memory."});
}

std::string MemoryPlan::largest(std::size_t most) const {
  auto sorted = parts_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  std::string text;
  for (std::size_t i = 0; i < std::min(most, sorted.size()) && sorted[i].second > 0; ++i)
    text += fmt::format("{}{} {}", i > 0 ? ", " : "", sorted[i].first, bytes_text(sorted[i].second));
  return text;
}

}  // namespace lacuna
