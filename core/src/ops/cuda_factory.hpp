// The GPU's operations, or an error where the build has none.
#pragma once

#include "lacuna/ops/core_ops.hpp"

namespace lacuna {

std::unique_ptr<CoreOps> make_cuda_ops(const sdk::Call& call, Cost& cost, void* workspace, std::size_t bytes);
std::size_t cuda_ops_workspace_bytes(const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens, sdk::i64 max_queries);

}  // namespace lacuna
