// A streaming read that cannot be optimised away, for measuring bandwidth and for emptying the L2 cache. Reading leaves
// no dirty lines whose write-back would fall into the next work's time.
#pragma once

#include <cuda_runtime.h>

#include "cuda_check.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

inline constexpr int kReadThreads = 512, kReadBlocksPerSm = 4;

/// *sum += the 32-bit words of data[0..n), modulo 2^32. Four 16-byte loads of a thread are under way at a time.
static __global__ void __launch_bounds__(kReadThreads)
    stream_read_kernel(const uint4* data, sdk::i64 n, unsigned* sum) {
  constexpr int kLoads = 4;
  const sdk::i64 threads = static_cast<sdk::i64>(gridDim.x) * kReadThreads;
  unsigned mine = 0;
  for (sdk::i64 i = static_cast<sdk::i64>(blockIdx.x) * kReadThreads + threadIdx.x; i < n; i += kLoads * threads) {
    uint4 part[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const sdk::i64 at = i + l * threads;
      part[l] = at < n ? data[at] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) mine += part[l].x + part[l].y + part[l].z + part[l].w;
  }
  mine = __reduce_add_sync(~0u, mine);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}

inline void stream_read(const void* data, std::size_t bytes, unsigned* sum, int sms, cudaStream_t stream) {
  stream_read_kernel<<<sms * kReadBlocksPerSm, kReadThreads, 0, stream>>>(
      static_cast<const uint4*>(data), static_cast<sdk::i64>(bytes / sizeof(uint4)), sum);
  check_cuda(cudaGetLastError(), "the launch of a streaming read");
}

}  // namespace lacuna
