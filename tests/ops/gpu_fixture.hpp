// Operations on the GPU beside the CPU's on the same inputs.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "lacuna/device/device.hpp"
#include "lacuna/ops/cuda_ops.hpp"
#include "ops/ops_fixture.hpp"

namespace lacuna::test {

/// Queries [seqs, heads, count, head_dim] of any type.
struct QueryFixture {
  QueryFixture(sdk::Dtype dtype, i32 seqs, i32 heads, i32 head_dim, i64 count, i64 first_position, unsigned seed,
               float scale = 1.f)
      : bytes(static_cast<std::size_t>(seqs * heads * count * head_dim * sdk::size_of(dtype))) {
    const auto values = random_floats(seqs * heads * count * head_dim, seed, scale);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (dtype == sdk::Dtype::f32)
        reinterpret_cast<float*>(bytes.data())[i] = values[i];
      else
        reinterpret_cast<sdk::u16*>(bytes.data())[i] =
            dtype == sdk::Dtype::bf16 ? sdk::to_bf16(values[i]) : sdk::to_f16(values[i]);
    }
    q = {bytes.data(),     dtype,   seqs,           heads,
         head_dim,         count,   first_position, static_cast<i64>(heads) * count * head_dim,
         count * head_dim, head_dim};
  }
  QueryFixture(const QueryFixture&) = delete;

  std::vector<unsigned char> bytes;
  sdk::Queries q;
};

/// CudaOps on a copy of a hand-made cache. `put` and `get` move arrays; run() poisons the workspace first.
class GpuFixture {
 public:
  GpuFixture(const sdk::Layer& layer, const PagedFixture& cache, i64 max_tokens, i64 max_queries)
      : device(cuda_device()), ops(call, cost, nullptr, 0) {
    call.layer = layer;
    call.kv = cache.view();
    call.num_seqs = call.kv.rows / layer.num_kv_heads;
    call.on_device = 1;
    call.stream = device->stream();
    call.kv.table = put(cache.table);
    call.kv.length = put(cache.length);
    call.kv.position = put(cache.position);
    call.kv.k = put(cache.k);
    call.kv.v = put(cache.v);
    workspace_bytes = CudaOps::workspace_bytes(layer, call.num_seqs, max_tokens, max_queries);
    workspace = allocate<unsigned char>(static_cast<i64>(workspace_bytes));
  }
  GpuFixture(const GpuFixture&) = delete;

  template <class T>
  T* allocate(i64 n) {
    auto buffer = std::make_shared<Buffer<T>>(device, std::max<i64>(n, 1));
    kept.push_back(buffer);
    return buffer->data();
  }
  template <class T>
  T* put(const std::vector<T>& host) {
    T* out = allocate<T>(static_cast<i64>(host.size()));
    device->copy_in(out, host.data(), host.size() * sizeof(T));
    return out;
  }
  template <class T>
  std::vector<T> get(const T* data, i64 n) {
    std::vector<T> out(static_cast<std::size_t>(n));
    device->copy_out(out.data(), data, out.size() * sizeof(T));
    return out;
  }
  sdk::Queries put(const QueryFixture& host) {
    sdk::Queries q = host.q;
    q.data = put(host.bytes);
    return q;
  }
  sdk::Selection put(const SelectionFixture& host) {
    sdk::Selection s = host.selection;
    s.piece_count = put(host.piece_count);
    s.pieces = put(host.pieces);
    s.token_count = put(host.token_count);
    s.tokens = put(host.tokens);
    s.exact_sinks = put(host.sinks);
    s.exact_window = put(host.window);
    s.full = put(host.full);
    if (s.piece_log_weight) s.piece_log_weight = put(host.piece_weight);
    if (s.token_log_weight) s.token_log_weight = put(host.token_weight);
    return s;
  }

  /// f(ops) with a poisoned workspace of `bytes` (all of it: 0).
  template <class F>
  void run(F f, std::size_t bytes = 0) {
    device->fill(workspace, 0xff, workspace_bytes);
    CudaOps with_workspace(call, cost, workspace, bytes ? bytes : workspace_bytes);
    f(with_workspace);
    device->synchronize();
  }

  std::shared_ptr<Device> device;
  sdk::Call call{};
  Cost cost;
  CudaOps ops;  // for operations that need no workspace
  sdk::Error error{};
  std::vector<std::shared_ptr<void>> kept;
  unsigned char* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

/// The first place where a mass is off by more than 1e-4 of itself and 1e-6, -1 if none is; untouched values (-inf)
/// must be so on both sides.
inline i64 first_difference(const std::vector<float>& found, const std::vector<float>& expected) {
  if (found.size() != expected.size()) return 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    if (found[i] != expected[i] &&
        !(std::abs(static_cast<double>(found[i]) - expected[i]) <= 1e-6 + 1e-4 * std::abs(expected[i])))
      return static_cast<i64>(i);
  return -1;
}

}  // namespace lacuna::test
