// One large matrix product through cuBLASLt. The library is loaded when it is first needed: it has half a gigabyte, and
// no command but a timed run wants it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>

namespace lacuna {

/// C = A^T B of n x n bf16 matrices (column major) with fp32 accumulation, in the form that cuBLASLt thinks best.
class Gemm {
 public:
  /// Null where cuBLASLt is not installed. Pointers are device memory, 256-byte aligned. Throws Error.
  static std::unique_ptr<Gemm> make(int n, const void* a, const void* b, void* c, void* workspace, std::size_t bytes);
  virtual ~Gemm() = default;
  virtual void enqueue(cudaStream_t stream) = 0;
};

}  // namespace lacuna
