#include "lacuna/device/clocks.hpp"

#include <fmt/format.h>

namespace lacuna {

std::string throttle_text(std::uint64_t reasons) {
  static constexpr const char* kNames[] = {
      "idle",          "application clocks",        "software power cap",        "hardware slowdown",
      "sync boost",    "software thermal slowdown", "hardware thermal slowdown", "hardware power brake",
      "display clocks"};
  std::string text;
  const auto append = [&](const std::string& name) { text += (text.empty() ? "" : ", ") + name; };
  std::uint64_t unnamed = reasons, bit = 1;
  for (const char* name : kNames) {
    if (reasons & bit) append(name);
    unnamed &= ~bit;
    bit <<= 1;
  }
  if (unnamed != 0) append(fmt::format("{:#x}", unnamed));
  return text.empty() ? "none" : text;
}

}  // namespace lacuna
