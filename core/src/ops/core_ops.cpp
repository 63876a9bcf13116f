#include "lacuna/ops/core_ops.hpp"

#include "cuda_factory.hpp"
#include "lacuna/ops/cpu_ops.hpp"

namespace lacuna {

std::unique_ptr<CoreOps> make_ops(const sdk::Call& call, Cost& cost, void* workspace, std::size_t bytes) {
  if (call.on_device) return make_cuda_ops(call, cost, workspace, bytes);
  return std::make_unique<CpuOps>(call, cost);
}

std::size_t ops_workspace_bytes(bool on_device, const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens,
                                sdk::i64 max_queries) {
  return on_device ? cuda_ops_workspace_bytes(layer, seqs, max_tokens, max_queries) : 0;
}

}  // namespace lacuna
