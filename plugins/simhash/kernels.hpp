// The plug-in's own CUDA kernels, as its .cpp sees them. All pointers are device memory; each call enqueues one kernel
// on `stream` (Call::stream) and neither allocates nor waits, so that a step can be captured in a CUDA graph. Throws
// Failure when a launch is refused.
#pragma once

#include <lacuna/sdk.hpp>

namespace simhash {
using namespace lacuna::sdk;

inline constexpr i32 kWordBits = 16;
inline constexpr i32 kMaxHeadDim = 256;  // of hash_keys: directions and keys are held in shared memory

/// Seeded Gaussian vectors: sequence s has those at data + s * words * kWordBits * head_dim, [words * kWordBits,
/// head_dim].
struct Directions {
  const float* data;
  i32 words, head_dim;

  LACUNA_HD const float* of(i64 seq, i64 word) const { return data + (seq * words + word) * kWordBits * head_dim; }
};

/// Codes of the dirty tokens' keys.
void hash_keys(const Paged& kv, const Dirty& dirty, i32 heads_kv, const Directions& directions, SideView<u16> codes,
               void* stream);

/// code [rows, words] of the newest query of each row's head.
void hash_queries(const Queries& q, const Rows& rows, const Directions& directions, u16* code, void* stream);

/// score(token) = -hamming(query's code, token's code) for the cached tokens; others are left as they are.
void score_tokens(const Paged& kv, i32 heads_kv, const u16* query_codes, i32 words, SideView<u16> codes,
                  const Scores& scores, void* stream);

}  // namespace simhash
