// The order of values that every ranking keeps, as unsigned numbers.
#pragma once

#include "lacuna/sdk/types.hpp"

namespace lacuna::cuda {

/// Larger values have larger keys, the two zeros the same one; -inf and NaN, which are never taken, have 0.
__device__ inline sdk::u32 key_of(float value) {
  const sdk::u32 bits = __float_as_uint(value + 0.f);
  const sdk::u32 key = bits ^ (static_cast<sdk::u32>(static_cast<sdk::i32>(bits) >> 31) | 0x80000000u);
  return value > -INFINITY ? key : 0u;
}

}  // namespace lacuna::cuda
