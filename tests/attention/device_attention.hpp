// A call of attention whose arrays are copied to the GPU, and the bound that its results must meet.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "attention/bound.hpp"
#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/device/device.hpp"

namespace lacuna::test {

/// The host call stays alive elsewhere; `attention` points to the copies.
class DeviceAttention {
 public:
  Attention attention;
  CudaAttentionPlan plan{};

  explicit DeviceAttention(const Attention& host) : attention(host), device_(cuda_device()) {
    const sdk::Paged& kv = host.kv;
    const i64 entries = static_cast<i64>(kv.rows) * kv.max_pages;
    i64 pages = 1;
    for (i64 n = 0; n < entries; ++n) pages = std::max<i64>(pages, kv.table[n] + 1);
    const i64 slots = pages * kv.page_size, bytes = slots * kv.head_dim * sdk::size_of(kv.dtype);
    attention.kv.table = upload(kv.table, entries);
    attention.kv.length = upload(kv.length, kv.rows);
    attention.kv.position = upload(kv.position, slots);
    attention.kv.k = upload(static_cast<const char*>(kv.k), bytes);
    attention.kv.v = upload(static_cast<const char*>(kv.v), bytes);
    const sdk::Queries& q = host.q;
    const i64 elements =
        (q.seqs - 1) * q.seq_stride + (q.heads - 1) * q.head_stride + (q.count - 1) * q.row_stride + q.head_dim;
    attention.q.data = upload(static_cast<const char*>(q.data), elements * sdk::size_of(q.dtype));
    if (host.read) set(*host.read);
  }
  DeviceAttention(const DeviceAttention&) = delete;

  void set(const sdk::Selection& s) {
    const i64 rows = s.rows.count(), pieces = rows * s.piece_capacity, tokens = rows * s.token_capacity;
    selection_ = s;
    selection_.piece_count = upload(s.piece_count, rows);
    selection_.pieces = upload(s.pieces, pieces);
    selection_.token_count = upload(s.token_count, rows);
    selection_.tokens = upload(s.tokens, tokens);
    selection_.exact_sinks = upload(s.exact_sinks, rows);
    selection_.exact_window = upload(s.exact_window, rows);
    selection_.full = upload(s.full, rows);
    if (s.piece_log_weight) selection_.piece_log_weight = upload(s.piece_log_weight, pieces);
    if (s.token_log_weight) selection_.token_log_weight = upload(s.token_log_weight, tokens);
    attention.read = &selection_;
  }

  /// The workspace starts as it was allocated, or filled with this byte.
  Result run(std::optional<int> garbage = {}) {
    prepare(garbage);
    enqueue();
    return results();
  }

  void prepare(std::optional<int> garbage = {}) {
    const auto rows = static_cast<i64>(attention.q.seqs) * attention.q.heads * attention.q.count;
    plan = plan_cuda_attention(attention);
    workspace_ = Buffer<char>(device_, static_cast<i64>(plan.workspace_bytes));
    if (garbage) device_->fill(workspace_.data(), *garbage, plan.workspace_bytes);
    const std::vector<float> unwritten(static_cast<std::size_t>(rows * attention.q.head_dim), kUnwritten);
    out_ = Buffer<float>(device_, rows * attention.q.head_dim);
    lse_ = Buffer<float>(device_, rows);
    device_->copy_in(out_.data(), unwritten.data(), sizeof(float) * unwritten.size());
    device_->copy_in(lse_.data(), unwritten.data(), sizeof(float) * static_cast<std::size_t>(rows));
    device_->synchronize();
  }
  void enqueue() {
    attend_cuda(attention, out_.data(), lse_.data(), workspace_.data(), plan.workspace_bytes, device_->stream());
  }
  Result results() {
    Result r{std::vector<float>(static_cast<std::size_t>(out_.size())),
             std::vector<float>(static_cast<std::size_t>(lse_.size())),
             {}};
    device_->copy_out(r.out.data(), out_.data(), sizeof(float) * r.out.size());
    device_->copy_out(r.lse.data(), lse_.data(), sizeof(float) * r.lse.size());
    return r;
  }
  Device& device() { return *device_; }

 private:
  std::shared_ptr<Device> device_;
  std::vector<Buffer<char>> copies_;
  sdk::Selection selection_{};
  Buffer<char> workspace_;
  Buffer<float> out_, lse_;

  template <class T>
  T* upload(const T* from, i64 n) {
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(n);
    copies_.emplace_back(device_, std::max<i64>(static_cast<i64>(bytes), 1));
    device_->copy_in(copies_.back().data(), from, bytes);
    return reinterpret_cast<T*>(copies_.back().data());
  }
};

/// Largest error as a factor of the bound, |out - exact| <= 4e-3 sum p ||v|| and |lse - exact| <= 2e-3: at most 1 is
/// within. Infinity for NaN, or where an empty row is not (0, -inf).
inline double worst_error(const Result& r, const Reference& exact, i64 head_dim) {
  constexpr double kOut = 4e-3, kLse = 2e-3, kBroken = std::numeric_limits<double>::infinity();
  double worst = 0;
  for (std::size_t n = 0; n < exact.lse.size(); ++n) {
    double squares = 0;
    for (i64 c = 0; c < head_dim; ++c) {
      const auto at = n * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(c);
      squares += (r.out[at] - exact.out[at]) * (r.out[at] - exact.out[at]);
    }
    if (std::isinf(exact.lse[n])) {
      if (r.lse[n] != exact.lse[n] || squares != 0) return kBroken;
      continue;
    }
    const double of_out = std::sqrt(squares) / (kOut * exact.pv_norm[n]);
    const double of_lse = std::abs(r.lse[n] - exact.lse[n]) / kLse;
    if (!(of_out < kBroken) || !(of_lse < kBroken)) return kBroken;
    worst = std::max({worst, of_out, of_lse});
  }
  return worst;
}

/// The GPU, as cases.hpp and trace_cases.hpp take a device.
struct GpuSide {
  static constexpr bool kCountsWork = false;
  static constexpr double kLse = 2e-3;
  static constexpr i64 kShippedQueries = 1 << 20, kFurtherQueries = 300;
  static Result run(const Attention& a) { return DeviceAttention(a).run(); }
  static double excess(const Result& r, const Reference& exact, i64 d) { return worst_error(r, exact, d); }
};

}  // namespace lacuna::test
