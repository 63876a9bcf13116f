// The shipped trace, the built-in strategies, and cells of them.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "lacuna/replay/replay.hpp"
#include "lacuna/strategy/registry.hpp"

namespace lacuna::testing {

inline const char* const kShipped = LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors";

inline const Registry& built_ins() {
  static const Registry registry = [] {
    Registry r;
    r.load_directory(LACUNA_PLUGIN_DIR);
    return r;
  }();
  return registry;
}

/// roles: {"select": {...}, "evict": {...}, "allocate": {...}}.
inline Cell cell_of(const Json& roles, std::uint64_t seed = 0) {
  Cell c;
  c.seed = seed;
  for (const auto& item : roles.items()) {
    const RoleKind role = item.key() == "select"  ? RoleKind::select
                          : item.key() == "evict" ? RoleKind::evict
                                                  : RoleKind::allocate;
    auto& place = role == RoleKind::select ? c.select : role == RoleKind::evict ? c.evict : c.allocate;
    place = resolve(built_ins(), item.value(), "test", "", role);
    c.label += item.value()["name"].get<std::string>();
  }
  return c;
}

}  // namespace lacuna::testing
