// The fused operations over memory of any device: inputs are copied to the host, the CPU's operations work on them, and
// outputs are copied back. Slow, and independent of every device's own operations.
#pragma once

#include <cstddef>
#include <vector>

#include "kv/support.hpp"
#include "lacuna/ops/cpu_ops.hpp"

namespace strategies_test {

using namespace lacuna;
using sdk::i32, sdk::i64;

/// n elements of device memory on the host; with `written`, they go back when the object ends.
template <class T>
class HostCopy {
 public:
  HostCopy(Device& device, const T* data, i64 n)
      : device_(device), host_(kv_test::download(data, data ? n : 0, device)) {}
  HostCopy(Device& device, T* data, i64 n, bool written) : HostCopy(device, data, n) {
    target_ = written ? data : nullptr;
  }
  HostCopy(const HostCopy&) = delete;
  ~HostCopy() {
    if (target_) device_.copy_in(target_, host_.data(), host_.size() * sizeof(T));
  }
  T* data() { return host_.empty() ? nullptr : host_.data(); }

 private:
  Device& device_;
  std::vector<T> host_;
  T* target_ = nullptr;
};

class HostQueries {
 public:
  HostQueries(Device& device, const sdk::Queries& q) : q(q) {
    const i64 elements =
        (q.seqs - 1) * q.seq_stride + (q.heads - 1) * q.head_stride + (q.count - 1) * q.row_stride + q.head_dim;
    bytes_ = kv_test::download(static_cast<const std::byte*>(q.data), elements * sdk::size_of(q.dtype), device);
    this->q.data = bytes_.data();
  }
  HostQueries(const HostQueries&) = delete;

  sdk::Queries q;

 private:
  std::vector<std::byte> bytes_;
};

class StagedOps final : public sdk::Ops {
  using Error = sdk::Error;
  using Reduce = sdk::Reduce;

 public:
  StagedOps(Device& device, const sdk::Call& call, const KvCache& cache)
      : device_(device), kv_(cache, -1, device), call_(call), ops_(call_, cost_) {
    call_.kv = kv_.kv;
    call_.on_device = 0;
    call_.stream = nullptr;
  }

  i32 window_mass(const sdk::Queries& q, Reduce reduce, float* columns, float* diagonals, i64 stride,
                  Error* error) noexcept override {
    HostQueries host(device_, q);
    Floats c = out(columns, q.seqs * q.heads * stride), d = out(diagonals, q.seqs * q.heads * stride);
    return ops_.window_mass(host.q, reduce, c.data(), d.data(), stride, error);
  }
  i32 read_mass(const sdk::Attended& attended, float* columns, i64 stride, Error* error) noexcept override {
    const sdk::Queries& q = attended.queries;
    HostQueries host(device_, q);
    HostCopy<float> lse(device_, attended.lse, q.seqs * q.heads * q.count);
    Floats c = out(columns, q.seqs * q.heads * stride);
    return ops_.read_mass({nullptr, host.q, nullptr, lse.data()}, c.data(), stride, error);
  }
  i32 group_reduce(const float* in, float* to, i64 n, i64 stride, Reduce reduce, Error* error) noexcept override {
    HostCopy<float> a(device_, in, i64{call_.num_seqs} * call_.layer.num_qo_heads * stride);
    Floats b = out(to, i64{call_.num_seqs} * call_.layer.num_kv_heads * stride);
    return ops_.group_reduce(a.data(), b.data(), n, stride, reduce, error);
  }
  i32 pool(const float* in, float* to, i32 rows, const i32* count, i64 stride, i32 kernel, Reduce reduce,
           Error* error) noexcept override {
    HostCopy<float> a(device_, in, rows * stride);
    HostCopy<i32> n(device_, count, rows);
    Floats b = out(to, rows * stride);
    return ops_.pool(a.data(), b.data(), rows, n.data(), stride, kernel, reduce, error);
  }
  i32 topk(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, i32* to, i32* count, i64 to_stride,
           Error* error) noexcept override {
    HostCopy<float> v(device_, values, rows * stride);
    HostCopy<i32> sizes(device_, n, rows), wanted(device_, k, rows);
    HostCopy<i32> list(device_, to, rows * to_stride, true), found(device_, count, rows, true);
    return ops_.topk(v.data(), rows, stride, sizes.data(), wanted.data(), list.data(), found.data(), to_stride, error);
  }
  i32 topp(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, double p, i32* to, i32* count,
           i64 to_stride, Error* error) noexcept override {
    HostCopy<float> v(device_, values, rows * stride);
    HostCopy<i32> sizes(device_, n, rows), most(device_, k, rows);
    HostCopy<i32> list(device_, to, rows * to_stride, true), found(device_, count, rows, true);
    return ops_.topp(v.data(), rows, stride, sizes.data(), most.data(), p, list.data(), found.data(), to_stride, error);
  }
  i32 mean_keys(i32 block, i32 full_divisor, float* to, Error* error) noexcept override {
    const sdk::Paged& kv = call_.kv;
    Floats means = out(to, i64{kv.rows} * ((kv.max_length + block - 1) / block) * kv.head_dim);
    return ops_.mean_keys(block, full_divisor, means.data(), error);
  }
  i32 mean_queries(const sdk::Queries& q, i32 tile, i32 full_divisor, float* to, Error* error) noexcept override {
    HostQueries host(device_, q);
    Floats means = out(to, q.seqs * q.heads * ((q.count + tile - 1) / tile) * q.head_dim);
    return ops_.mean_queries(host.q, tile, full_divisor, means.data(), error);
  }
  i32 antidiagonal_mass(const sdk::Queries& q, i32 stride, sdk::Scores& scores, Error* error) noexcept override {
    HostQueries host(device_, q);
    Floats value = out(scores.value, scores.rows.count() * scores.stride);
    sdk::Scores on_host = scores;
    on_host.value = value.data();
    return ops_.antidiagonal_mass(host.q, stride, on_host, error);
  }

 private:
  using Floats = HostCopy<float>;
  Floats out(float* data, i64 n) { return Floats(device_, data, n, true); }

  Device& device_;
  const kv_test::HostView kv_;
  sdk::Call call_;
  Cost cost_;
  CpuOps ops_;
};

}  // namespace strategies_test
