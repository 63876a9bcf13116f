#include "cuda_factory.hpp"

#include "lacuna/ops/cuda_ops.hpp"

namespace lacuna {

std::unique_ptr<CoreOps> make_cuda_ops(const sdk::Call& call, Cost& cost, void* workspace, std::size_t bytes) {
  return std::make_unique<CudaOps>(call, cost, workspace, bytes);
}

std::size_t cuda_ops_workspace_bytes(const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens,
                                     sdk::i64 max_queries) {
  return CudaOps::workspace_bytes(layer, seqs, max_tokens, max_queries);
}

}  // namespace lacuna
