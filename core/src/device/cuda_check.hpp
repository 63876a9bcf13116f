// Turns a CUDA error code into an Error.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "lacuna/base/error.hpp"

namespace lacuna {

inline void check_cuda(cudaError_t status, const char* call, const std::string& where = "") {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed call must not fail the next kernel launch
  throw Error({std::string(call) + " failed", "", cudaGetErrorString(status), where, ""});
}

}  // namespace lacuna
