#include "kernels.hpp"

namespace simhash {
namespace {

constexpr i32 kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr i32 kWordsAtOnce = kWarp / kWordBits;  // a lane computes one bit, a ballot gathers the words
constexpr i32 kKeysAtOnce = 2;                   // of a warp: each direction that it reads serves so many keys
constexpr i32 kTokensOfBlock = 64, kTokensOfWarp = 256;
constexpr unsigned kAllLanes = ~0u;

void check_launch() {
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) throw Failure(cudaGetErrorString(e));
}

i64 blocks_for(i64 n, i64 of_block) { return (n + of_block - 1) / of_block; }

__device__ i32 lanes_in_use(i32 words, i32 first_word) { return min(kWarp, (words - first_word) * kWordBits); }

/// Block (chunk of dirty tokens, KV row, pair of words).
__global__ void __launch_bounds__(kThreads)
    hash_keys_kernel(Paged kv, Dirty dirty, i32 heads_kv, Directions directions, SideView<u16> codes) {
  extern __shared__ float shared[];
  const i32 d = kv.head_dim, pitch = d + 1;  // lanes read a column: the pitch spreads it over the banks
  const i32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* g = shared;                                              // [lanes, pitch]
  float* keys = shared + kWarp * pitch + warp * kKeysAtOnce * d;  // [kKeysAtOnce, d] of this warp
  const i64 row = blockIdx.y;
  const i32 first_word = blockIdx.z * kWordsAtOnce, lanes = lanes_in_use(directions.words, first_word);
  const i32 begin = dirty.begin[row] + static_cast<i32>(blockIdx.x) * kTokensOfBlock,
            end = min(dirty.end[row], begin + kTokensOfBlock);
  if (begin >= end) return;

  const float* source = directions.of(row / heads_kv, first_word);
  for (i32 i = threadIdx.x; i < lanes * d; i += kThreads) g[i / d * pitch + i % d] = source[i];
  __syncthreads();
  for (i32 token = begin + warp * kKeysAtOnce; token < end; token += kWarps * kKeysAtOnce) {
    for (i32 t = 0; t < kKeysAtOnce; ++t)
      for (i32 e = lane; e < d; e += kWarp) keys[t * d + e] = token + t < end ? kv.key(row, token + t, e) : 0.f;
    __syncwarp();
    float dot[kKeysAtOnce] = {};
    if (lane < lanes) {
      for (i32 e = 0; e < d; ++e) {
        const float direction = g[lane * pitch + e];
#pragma unroll
        for (i32 t = 0; t < kKeysAtOnce; ++t) dot[t] += direction * keys[t * d + e];
      }
    }
#pragma unroll
    for (i32 t = 0; t < kKeysAtOnce; ++t) {
      const unsigned bits = __ballot_sync(kAllLanes, lane < lanes && dot[t] >= 0.f);
      if (lane < lanes / kWordBits && token + t < end)
        codes.at(row, token + t, first_word + lane) = static_cast<u16>(bits >> (lane * kWordBits));
    }
    __syncwarp();  // the next keys overwrite these
  }
}

/// One warp a block (row, pair of words).
__global__ void __launch_bounds__(kWarp) hash_queries_kernel(Queries q, Rows rows, Directions directions, u16* code) {
  const i32 lane = threadIdx.x, first_word = blockIdx.y * kWordsAtOnce;
  const i32 lanes = lanes_in_use(directions.words, first_word);
  const i64 row = blockIdx.x, seq = rows.seq_of(row), head = rows.head_of(row);
  float dot = 0.f;
  if (lane < lanes) {
    const float* direction = directions.of(seq, first_word) + lane * q.head_dim;
    for (i32 e = 0; e < q.head_dim; ++e) dot += direction[e] * q.at(seq, head, q.count - 1, e);
  }
  const unsigned bits = __ballot_sync(kAllLanes, lane < lanes && dot >= 0.f);
  if (lane < lanes / kWordBits)
    code[row * directions.words + first_word + lane] = static_cast<u16>(bits >> (lane * kWordBits));
}

/// A warp scores kTokensOfWarp tokens of a row. Word: u32 where pairs of 16-bit words may be read at once, else u16;
/// `words` and the codes' strides count Words.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    score_tokens_kernel(const i32* length, i32 heads_kv, const Word* query_codes, i32 words, SideView<const Word> codes,
                        Scores scores, i64 warps_of_row) {
  const i64 warp = (static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x) / kWarp, row = warp / warps_of_row;
  if (row >= scores.rows.count()) return;
  const i64 kv_row = scores.rows.kv_row(row, heads_kv), begin = warp % warps_of_row * kTokensOfWarp;
  const i64 cached = min(length[kv_row], scores.units), end = min(begin + kTokensOfWarp, cached);
  for (i64 token = begin + threadIdx.x % kWarp; token < end; token += kWarp) {
    i32 distance = 0;
    for (i32 w = 0; w < words; ++w) distance += __popc(query_codes[row * words + w] ^ codes.at(kv_row, token, w));
    scores.value[row * scores.stride + token] = static_cast<float>(-distance);
  }
}

template <class Word>
void launch_score(const Paged& kv, i32 heads_kv, const u16* query_codes, i32 words, SideView<u16> codes,
                  const Scores& scores, cudaStream_t stream) {
  constexpr i64 kJoined = sizeof(Word) / sizeof(u16);
  const i64 warps_of_row = blocks_for(scores.units, kTokensOfWarp),
            blocks = blocks_for(scores.rows.count() * warps_of_row, kWarps);
  if (blocks == 0) return;
  score_tokens_kernel<Word><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      kv.length, heads_kv, reinterpret_cast<const Word*>(query_codes), static_cast<i32>(words / kJoined),
      SideView<const Word>{reinterpret_cast<const Word*>(codes.data), codes.row_stride / kJoined,
                           codes.unit_stride / kJoined},
      scores, warps_of_row);
  check_launch();
}

}  // namespace

void hash_keys(const Paged& kv, const Dirty& dirty, i32 heads_kv, const Directions& directions, SideView<u16> codes,
               void* stream) {
  const dim3 blocks(static_cast<unsigned>(blocks_for(dirty.max_units, kTokensOfBlock)),
                    static_cast<unsigned>(dirty.rows),
                    static_cast<unsigned>(blocks_for(directions.words, kWordsAtOnce)));
  if (blocks.x == 0 || blocks.y == 0) return;
  const std::size_t floats = static_cast<std::size_t>(kWarp) * (kv.head_dim + 1) + kWarps * kKeysAtOnce * kv.head_dim;
  hash_keys_kernel<<<blocks, kThreads, floats * sizeof(float), static_cast<cudaStream_t>(stream)>>>(kv, dirty, heads_kv,
                                                                                                    directions, codes);
  check_launch();
}

void hash_queries(const Queries& q, const Rows& rows, const Directions& directions, u16* code, void* stream) {
  const dim3 blocks(static_cast<unsigned>(rows.count()),
                    static_cast<unsigned>(blocks_for(directions.words, kWordsAtOnce)));
  if (blocks.x == 0) return;
  hash_queries_kernel<<<blocks, kWarp, 0, static_cast<cudaStream_t>(stream)>>>(q, rows, directions, code);
  check_launch();
}

void score_tokens(const Paged& kv, i32 heads_kv, const u16* query_codes, i32 words, SideView<u16> codes,
                  const Scores& scores, void* stream) {
  const bool pairs = (words | codes.row_stride | codes.unit_stride) % 2 == 0;
  (pairs ? launch_score<u32> : launch_score<u16>)(kv, heads_kv, query_codes, words, codes, scores,
                                                  static_cast<cudaStream_t>(stream));
}

}  // namespace simhash
