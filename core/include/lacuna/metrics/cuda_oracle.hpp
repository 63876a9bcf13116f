// The matched oracles on a GPU: what matched_oracle.hpp computes, on arrays in device memory.
#pragma once

#include "lacuna/device/device.hpp"
#include "lacuna/metrics/matched_oracle.hpp"

namespace lacuna {

/// matched_oracle with every pointer of `a` and dense_lse in memory of `device`; every KV row has kv.max_length tokens.
/// Results agree with the CPU's but for the rounding of fp32 probabilities (1e-4 of a value) and are the same bits each
/// time. A layer is gone through by ranges of tiles, and once more for every distinct array of exact windows among the
/// requests. Allocates (`range_bytes`, more where one tile of all heads needs it, and about 12 bytes a query of a query
/// head) and synchronises. Throws Error out of memory, for heads over 256 and in builds without CUDA.
std::vector<std::vector<double>> matched_oracle_cuda(const Attention& a, sdk::i32 q_tile, const float* dense_lse,
                                                     const std::vector<OracleRequest>& requests, Device& device,
                                                     std::size_t range_bytes = std::size_t{2} << 30);

/// matched_evict_oracle likewise. Tokens whose masses differ by less than rounding may change places, and with them
/// what single queries read; a KV head's sum over its queries does not show it. Once over the keys, and again for each
/// method.
std::vector<std::vector<double>> matched_evict_oracle_cuda(const Attention& a, sdk::i64 cut, const float* dense_lse,
                                                           const std::vector<std::vector<sdk::i64>>& kept,
                                                           Device& device);

}  // namespace lacuna
