// Heads named by a class table, for kernels.
#pragma once

#include <string>

#include "lacuna/sdk/params.hpp"

namespace lacuna::sdk {

/// A set of KV heads that a lambda can carry to the device.
struct HeadSet {
  static constexpr i32 kMaxHeads = 256;
  u64 bits[kMaxHeads / 64] = {};

  void insert(i32 head) { bits[head / 64] |= u64{1} << (head % 64); }
  LACUNA_HD bool contains(i64 head) const { return (bits[head / 64] >> (head % 64)) & 1u; }
};

/// The heads that `classes` names for this layer. Throws Failure on a head that the layer does not have.
inline HeadSet heads_of_class(const Classes& classes, const Layer& layer) {
  HeadSet out;
  const auto named = classes.find(layer.index);
  if (named == classes.end()) return out;
  const i32 heads = layer.num_kv_heads < HeadSet::kMaxHeads ? layer.num_kv_heads : HeadSet::kMaxHeads;
  for (const i32 head : named->second) {
    if (head < 0 || head >= heads)
      throw Failure("classes: layer " + std::to_string(layer.index) + " names KV head " + std::to_string(head) +
                    ", expected 0.." + std::to_string(heads - 1));
    out.insert(head);
  }
  return out;
}

}  // namespace lacuna::sdk
