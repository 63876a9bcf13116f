// What every launcher needs: the stream, the workspace, errors, and the shared memory of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "lacuna/base/error.hpp"
#include "lacuna/sdk/context.hpp"

namespace lacuna::cuda {

using sdk::i32;
using sdk::i64;
using sdk::u16;
using sdk::u32;
using sdk::u64;

template <class T>
__host__ __device__ constexpr T ceil_div(T n, T d) {
  return (n + d - 1) / d;
}

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not fail the next one
  throw Error({std::string(op) + " failed on the GPU", "", cudaGetErrorString(status), op, ""});
}

inline cudaStream_t stream_of(const sdk::Call& call) { return static_cast<cudaStream_t>(call.stream); }

/// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...), and nothing for no blocks.
template <class... Parameters, class... Arguments>
void launch(const char* op, cudaStream_t stream, void (*kernel)(Parameters...), i64 blocks, int threads,
            std::size_t shared_bytes, Arguments... arguments) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  constexpr i64 kMostBlocks = 0x7fffffff;
  if (blocks <= 0) return;
  if (blocks > kMostBlocks)
    throw Error({"too many rows for one launch", std::to_string(kMostBlocks) + " blocks", std::to_string(blocks), op,
                 "Ask for fewer tiles at once."});
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          op);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), op);
}

/// Element of a cached key's first channel.
__device__ inline i64 key_element(const sdk::Paged& kv, i64 row, i32 slot) {
  const i32 page = slot / kv.page_size;  // 32-bit divisions are several times cheaper
  return (static_cast<i64>(kv.table[row * kv.max_pages + page]) * kv.page_size + (slot - page * kv.page_size)) *
         kv.head_dim;
}

/// Hands out the workspace from its start.
class Carver {
 public:
  static constexpr std::size_t kAlignment = 256;

  Carver(void* memory, std::size_t bytes, const char* op)
      : memory_(static_cast<char*>(memory)), bytes_(bytes), op_(op) {}

  static constexpr std::size_t padded(std::size_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }
  std::size_t left() const { return bytes_ - used_; }

  template <class T>
  T* take(i64 n) {
    const std::size_t wanted = padded(static_cast<std::size_t>(n) * sizeof(T));
    if (wanted > left())
      throw Error({"the workspace is too small", std::to_string(used_ + wanted) + " bytes",
                   std::to_string(bytes_) + " bytes", op_, "Size it by CudaOps::workspace_bytes for this shape."});
    T* out = reinterpret_cast<T*>(memory_ + used_);
    used_ += wanted;
    return out;
  }

 private:
  char* memory_;
  std::size_t bytes_, used_ = 0;
  const char* op_;
};

}  // namespace lacuna::cuda
