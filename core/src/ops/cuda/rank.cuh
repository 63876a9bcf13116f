#pragma once

#include "launch.cuh"

namespace lacuna::cuda {

/// Bytes in which rank_normalise does `rows` rows of `stride` values at once.
std::size_t rank_workspace_bytes(i64 rows, i64 stride);

}  // namespace lacuna::cuda
