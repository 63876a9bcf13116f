// Pooling along positions and reduction over GQA groups: an element a thread, in the CPU's order, so with its bits.
#include "lacuna/ops/cuda_ops.hpp"
#include "launch.cuh"
#include "ops/guarded.hpp"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void pool_kernel(const float* in, float* out, i64 elements, const i32* count, i64 stride, i32 kernel,
                            sdk::Reduce reduce) {
  const i64 n = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (n >= elements) return;
  const i64 row = n / stride, i = n % stride, length = count[row];
  if (i >= length) return;
  const float* x = in + row * stride;
  const i64 first = i - kernel / 2, begin = max(i64{0}, first), end = min(length, first + kernel);
  if (reduce == sdk::Reduce::max) {
    float most = -INFINITY;
    for (i64 j = begin; j < end; ++j) most = most < x[j] ? x[j] : most;
    out[n] = most;
  } else {
    double sum = 0;
    for (i64 j = begin; j < end; ++j) sum += x[j];
    out[n] = static_cast<float>(reduce == sdk::Reduce::mean ? sum / kernel : sum);
  }
}

__global__ void group_reduce_kernel(const float* in, float* out, i64 rows, i32 group, i64 n, i64 stride,
                                    sdk::Reduce reduce) {
  const i64 element = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (element >= rows * n) return;
  const i64 row = element / n, i = element % n;
  const float* x = in + row * group * stride + i;
  double value = x[0];
  for (i32 g = 1; g < group; ++g) {
    const double next = x[g * stride];
    value = reduce != sdk::Reduce::max ? value + next : value < next ? next : value;
  }
  out[row * stride + i] = static_cast<float>(reduce == sdk::Reduce::mean ? value / group : value);
}

}  // namespace
}  // namespace cuda

sdk::i32 CudaOps::pool(const float* in, float* out, sdk::i32 rows, const sdk::i32* count, sdk::i64 stride,
                       sdk::i32 kernel, sdk::Reduce reduce, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    if (kernel < 1) throw Error({"a pooling kernel is empty", "at least 1", std::to_string(kernel), "pool", ""});
    const sdk::i64 elements = rows * stride;
    cuda::launch("pool", cuda::stream_of(call_), cuda::pool_kernel, cuda::ceil_div<sdk::i64>(elements, cuda::kThreads),
                 cuda::kThreads, 0, in, out, elements, count, stride, kernel, reduce);
    cost_.bytes += 8. * static_cast<double>(elements);
    cost_.flops += static_cast<double>(elements) * kernel;
  });
}

sdk::i32 CudaOps::group_reduce(const float* in, float* out, sdk::i64 n, sdk::i64 stride, sdk::Reduce reduce,
                               sdk::Error* error) noexcept {
  return guarded(error, [&] {
    const sdk::i32 group = call_.layer.group();
    const sdk::i64 rows = static_cast<sdk::i64>(call_.num_seqs) * call_.layer.num_kv_heads;
    cuda::launch("group_reduce", cuda::stream_of(call_), cuda::group_reduce_kernel,
                 cuda::ceil_div<sdk::i64>(rows * n, cuda::kThreads), cuda::kThreads, 0, in, out, rows, group, n, stride,
                 reduce);
    cost_.bytes += 4. * static_cast<double>(rows * n * (group + 1));
    cost_.flops += static_cast<double>(rows * n * group);
  });
}

}  // namespace lacuna
