// True softmax mass of every unit of some tiles of queries.
#include <algorithm>

#include "lacuna/ops/cuda_ops.hpp"
#include "mass.cuh"
#include "rank.cuh"

namespace lacuna {

void CudaOps::unit_mass(const sdk::Queries& q, sdk::Scores& out) {
  using sdk::i64;
  const char* op = "unit_mass";
  const sdk::Rows& rows = out.rows;
  const i64 begin = rows.query_begin(0), count = rows.query_end(rows.tiles - 1) - begin;
  if (rows.count() == 0 || count <= 0 || call_.kv.max_length == 0) return;
  cuda::Carver workspace(workspace_, workspace_bytes_, op);
  const cudaStream_t stream = cuda::stream_of(call_);
  cuda::Mass m = cuda::prepare_mass(call_, q, begin, count, q.first_position + begin, workspace, op);
  cuda::find_lse(m, workspace, stream, op);
  cuda::sum_units(m, {rows, out.value, out.stride, out.units, out.unit_tokens, 1.}, false, stream, op);
  cost_.flops += 4. * cuda::pairs_at_most(m) * q.head_dim;
  cost_.bytes += 2. * (cuda::key_bytes_at_most(call_.kv) + cuda::query_bytes(q)) +
                 4. * static_cast<double>(rows.count() * out.units);
}

std::size_t CudaOps::workspace_bytes(const sdk::Layer& layer, sdk::i32 seqs, sdk::i64 max_tokens,
                                     sdk::i64 max_queries) {
  return std::max(cuda::mass_workspace_bytes(layer, seqs, max_tokens, max_queries) +
                      cuda::read_workspace_bytes(layer, seqs, max_tokens, max_queries),
                  cuda::rank_workspace_bytes(static_cast<sdk::i64>(seqs) * layer.num_qo_heads, max_tokens));
}

}  // namespace lacuna
