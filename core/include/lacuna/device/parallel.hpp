// Loops of the core that run where the arrays are. A file that calls for_each with a LACUNA_HD lambda stands under
// PORTABLE_SOURCES of its module: nvcc compiles it in CUDA builds.
#pragma once

#include "lacuna/base/error.hpp"
#include "lacuna/device/device.hpp"
#include "lacuna/sdk/types.hpp"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace lacuna {

#if defined(__CUDACC__)
namespace detail {
template <class F>
__global__ void for_each_kernel(sdk::i64 n, F f) {
  for (sdk::i64 i = blockIdx.x * static_cast<sdk::i64>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<sdk::i64>(gridDim.x) * blockDim.x)
    f(i);
}
}  // namespace detail
#endif

/// f(i) for i in [0, n): OpenMP threads on the CPU, the device's stream on a GPU (never synchronises, capturable). f is
/// a `[=] LACUNA_HD (i64 i)` lambda that writes to places that no other i touches. Throws Error for a failed launch.
template <class F>
void for_each(const Device& device, sdk::i64 n, F f) {
  if (n <= 0) return;
#if defined(__CUDACC__)
  if (device.on_device()) {
    constexpr sdk::i64 kThreads = 128, kMaxBlocks = 1 << 16;
    const sdk::i64 blocks = (n + kThreads - 1) / kThreads;
    detail::for_each_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
                              static_cast<cudaStream_t>(device.stream())>>>(n, f);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
      throw Error({"a kernel did not start", "", cudaGetErrorString(status), "for_each", ""});
    return;
  }
#else
  if (device.on_device()) throw Error({"no CUDA in this build", "a build with CUDA", "a CPU build", "for_each", ""});
#endif
  [[maybe_unused]] constexpr sdk::i64 kWorthThreads = 1024;  // nvcc does not count its use in the pragma
#pragma omp parallel for schedule(static) if (n >= kWorthThreads)
  for (sdk::i64 i = 0; i < n; ++i) f(i);
}

}  // namespace lacuna
