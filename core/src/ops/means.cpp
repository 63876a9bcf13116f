// Mean keys of blocks and mean queries of tiles, summed in fp64.
#include <algorithm>
#include <vector>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "visible.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

// The mean of n rows of d elements (row i at element `at(i)` of `data`) into out, over `divisor`.
template <class At>
void mean_row(const void* data, sdk::Dtype dtype, i64 n, i32 d, i64 divisor, At at, float* out) {
  std::vector<double> sum(static_cast<std::size_t>(d), 0.);
  std::vector<float> row(static_cast<std::size_t>(d));
  for (i64 i = 0; i < n; ++i) {
    convert_row(data, dtype, at(i), d, row.data());
    for (std::size_t c = 0; c < row.size(); ++c) sum[c] += row[c];
  }
  for (std::size_t c = 0; c < row.size(); ++c)
    out[c] = n > 0 ? static_cast<float>(sum[c] / static_cast<double>(divisor)) : 0.f;
}

void check_span(i32 span, const char* op) {
  if (span < 1) throw Error({"a mean is over no token", "at least 1", std::to_string(span), op, ""});
}

}  // namespace

i32 CpuOps::mean_keys(i32 block, i32 full_divisor, float* out, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    check_span(block, "mean_keys");
    const sdk::Paged& kv = call_.kv;
    const i64 blocks = (kv.max_length + block - 1) / block;
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 row = 0; row < kv.rows; ++row)
      for (i64 b = 0; b < blocks; ++b) {
        const i64 begin = b * block, n = std::clamp<i64>(kv.length[row] - begin, 0, block);
        mean_row(
            kv.k, kv.dtype, n, kv.head_dim, full_divisor ? block : n,
            [&](i64 i) { return kv.physical(row, begin + i) * kv.head_dim; }, out + (row * blocks + b) * kv.head_dim);
      }
    cost_.bytes += key_bytes(kv) + 4. * static_cast<double>(kv.rows * blocks * kv.head_dim);
    cost_.flops += key_bytes(kv) / static_cast<double>(sdk::size_of(kv.dtype));
  });
}

i32 CpuOps::mean_queries(const sdk::Queries& q, i32 tile, i32 full_divisor, float* out, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    check_span(tile, "mean_queries");
    const i64 tiles = (q.count + tile - 1) / tile, heads = static_cast<i64>(q.seqs) * q.heads;
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 head = 0; head < heads; ++head)
      for (i64 t = 0; t < tiles; ++t) {
        const i64 begin = t * tile, n = std::min<i64>(q.count - begin, tile);
        const i64 first = head / q.heads * q.seq_stride + head % q.heads * q.head_stride + begin * q.row_stride;
        mean_row(
            q.data, q.dtype, n, q.head_dim, full_divisor ? tile : n, [&](i64 i) { return first + i * q.row_stride; },
            out + (head * tiles + t) * q.head_dim);
      }
    cost_.bytes += query_bytes(q) + 4. * static_cast<double>(heads * tiles * q.head_dim);
    cost_.flops += static_cast<double>(heads * q.count) * q.head_dim;
  });
}

}  // namespace lacuna
