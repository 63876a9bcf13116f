#include "layer_mass.cuh"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr int kFillThreads = 256;

__global__ void seen_kernel(sdk::Paged kv, i64 queries, i32* seen) {
  const i64 n = blockIdx.x * static_cast<i64>(kFillThreads) + threadIdx.x;
  if (n < kv.rows * queries) seen[n] = max(0, static_cast<i32>(kv.length[n / queries] - queries + n % queries + 1));
}

// To base 2; a query that reads nothing has no probabilities.
__global__ void lse_kernel(const float* natural, i64 n, double* lse) {
  const i64 i = blockIdx.x * static_cast<i64>(kFillThreads) + threadIdx.x;
  if (i < n) lse[i] = natural[i] > -INFINITY ? natural[i] * cuda::kLog2E : INFINITY;
}

}  // namespace

LayerMass prepare_layer_mass(const Attention& a, const float* dense_lse, Device& device, const char* op) {
  sdk::Call call{};
  call.layer = a.layer;
  call.num_seqs = a.q.seqs;
  call.kv = a.kv;
  call.on_device = 1;
  call.stream = device.stream();
  const cudaStream_t stream = cuda::stream_of(call);
  const std::size_t bytes = cuda::mass_workspace_bytes(a.layer, a.q.seqs, a.kv.max_length, a.q.count);
  LayerMass out{Buffer<unsigned char>(borrowed(device), static_cast<i64>(bytes)),
                cuda::make_mass(call, a.q, 0, a.q.count, op)};
  cuda::Carver memory(out.memory.data(), bytes, op);
  // By slot, not by position: that is where Attention has its queries.
  out.mass.first_position = a.q.first_position;
  out.mass.positions = a.q.count;
  const i64 slots = a.kv.rows * a.q.count, rows = out.mass.heads() * a.q.count;
  i32* seen = memory.take<i32>(slots);
  cuda::launch(op, stream, seen_kernel, cuda::ceil_div<i64>(slots, kFillThreads), kFillThreads, 0, a.kv, a.q.count,
               seen);
  double* lse = memory.take<double>(rows);
  cuda::launch(op, stream, lse_kernel, cuda::ceil_div<i64>(rows, kFillThreads), kFillThreads, 0, dense_lse, rows, lse);
  out.mass.seen = seen;
  out.mass.lse = lse;
  cuda::find_norms(out.mass, a.layer.softmax_scale, memory, stream, op);
  return out;
}

}  // namespace lacuna
