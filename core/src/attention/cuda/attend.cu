// Plans and enqueues attention on the GPU: lists of a few rows of the selection, the kernel over them, the next rows;
// at last, if keys were split, the merge. No fmt here: nvcc 13 cannot evaluate fmt 9's compile-time check of formats.
#include "lacuna/attention/cuda_attention.hpp"

#include <algorithm>
#include <cstdint>
#include <string>

#include "attention/shapes.hpp"
#include "lacuna/base/error.hpp"
#include "launch.hpp"

namespace lacuna {
namespace cuda::attention {

void check_launch(const char* kernel) {
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess)
    throw Error({"a kernel did not start", "", cudaGetErrorString(status), kernel, ""});
}

namespace {

constexpr i64 kListBytes = i64{512} << 20;  // of key lists at a time: some thousands of rows at 32K tokens
constexpr i64 kLeastSplitKeys = 256;        // fewer would be mostly prologue
constexpr std::size_t kAlignment = 256;

/// Hands out the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(i64 n) {
    char* at = base_ + used_;
    used_ += (static_cast<std::size_t>(n) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return base_ ? reinterpret_cast<T*>(at) : nullptr;
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

struct Call {
  const Attention& a;
  CudaAttentionPlan plan{};
  sdk::Rows rows{};
  i32 heads = 0;  // query heads of a row
  i64 tiles_per_row = 0;
  i64 first_query = 0, queries = 0;  // that the call computes, of the batch
  bool weighted = false;
  i64 list_stride = 0;

  explicit Call(const Attention& attention);
  i64 result_rows() const { return a.q.seqs * a.layer.num_qo_heads * queries; }
  ListOutput lists(Carver& carver) const;
  Results parts(Carver& carver) const;
};

/// Thread blocks of a kernel that a GPU of 132 SMs holds at once (by shared memory, head size 128). A constant, so that
/// the same call is cut in the same way on every GPU.
i64 resident_blocks(i32 tile_rows) {
  constexpr i64 kSms = 132;
  return kSms * (tile_rows == 16 ? 3 : tile_rows == kGenericTileRows ? 8 : 2);
}

Call::Call(const Attention& attention) : a(attention) {
  check_layout(a);
  const i32 d = a.layer.head_dim, group = a.layer.group();
  const sdk::Selection* read = a.read;
  rows =
      read ? read->rows : sdk::Rows{a.q.seqs, a.layer.num_kv_heads, 0, 1, static_cast<i32>(a.q.count), 0, a.q.count, 0};
  heads = read && rows.per_query_head ? 1 : group;
  first_query = static_cast<i64>(rows.tile_begin) * rows.q_tile;
  queries = std::min(a.q.count, first_query + static_cast<i64>(rows.tiles) * rows.q_tile) - first_query;

  plan.tensor_cores = a.kv.dtype != Dtype::f32 && (d == 64 || d == 128 || d == 256);
  if (!plan.tensor_cores && d > kGenericMostHeadDim)
    throw Error({"the head size is larger than the GPU kernels take", std::to_string(kGenericMostHeadDim),
                 std::to_string(d), "attention", "Use device = \"cpu\"."});
  const i64 packed = std::min<i64>(rows.q_tile, a.q.count) * heads;
  plan.tile_rows = !plan.tensor_cores                 ? kGenericTileRows
                   : packed <= 16                     ? 16
                   : packed <= 64 || d > kWideHeadDim ? 64
                                                      : 128;
  tiles_per_row = (packed + plan.tile_rows - 1) / plan.tile_rows;
  const i64 tiles = std::max<i64>(rows.count() * tiles_per_row, 1);
  const i64 most = std::min((a.kv.max_length + kLeastSplitKeys - 1) / kLeastSplitKeys, kMostSplits);
  plan.splits = static_cast<i32>(std::clamp<i64>(resident_blocks(plan.tile_rows) / tiles, 1, std::max<i64>(most, 1)));

  if (read) {
    weighted = !a.ignore_weights && (read->piece_log_weight || read->token_log_weight);
    list_stride = std::max<i64>(a.kv.max_length, 1);
    const i64 row_bytes =
        list_stride * static_cast<i64>(sizeof(i32) + (weighted ? sizeof(float) + sizeof(OwnerKey) : 0));
    plan.list_rows = std::clamp<i64>(kListBytes / row_bytes, 1, std::max<i64>(rows.count(), 1));
  }
  Carver counted(nullptr);
  lists(counted);
  parts(counted);
  plan.workspace_bytes = counted.used();
}

ListOutput Call::lists(Carver& carver) const {
  ListOutput out{};
  if (!a.read) return out;
  out.stride = list_stride;
  out.slot = carver.take<i32>(plan.list_rows * list_stride);
  out.count = carver.take<i32>(plan.list_rows);
  if (weighted) {
    out.weight = carver.take<float>(plan.list_rows * list_stride);
    out.owner = carver.take<OwnerKey>(plan.list_rows * list_stride);
  }
  return out;
}

Results Call::parts(Carver& carver) const {
  Results out{nullptr, nullptr, first_query, queries};
  if (plan.splits == 1) return out;
  out.out = carver.take<float>(plan.splits * result_rows() * a.layer.head_dim);
  out.lse = carver.take<float>(plan.splits * result_rows());
  return out;
}

bool aligned_queries(const sdk::Queries& q) {
  constexpr i64 kElements = 8;  // of 16 bits
  return reinterpret_cast<std::uintptr_t>(q.data) % 16 == 0 && q.seq_stride % kElements == 0 &&
         q.head_stride % kElements == 0 && q.row_stride % kElements == 0;
}

void launch_attention(const Call& call, const Job& job, i64 rows, cudaStream_t stream) {
  const i64 blocks = rows * job.tiles_per_row * job.splits;
  if (!call.plan.tensor_cores) return launch_generic(job, blocks, stream);
  switch (job.layer.head_dim) {
    case 64: return launch_tensor<64>(job, blocks, stream);
    case 128: return launch_tensor<128>(job, blocks, stream);
    default: return launch_tensor<256>(job, blocks, stream);
  }
}

void enqueue(const Attention& a, float* out, float* lse, void* workspace, std::size_t workspace_bytes,
             cudaStream_t stream) {
  const Call call(a);
  const CudaAttentionPlan& plan = call.plan;
  if (workspace_bytes < plan.workspace_bytes)
    throw Error({"the workspace of attention is too small", std::to_string(plan.workspace_bytes) + " bytes",
                 std::to_string(workspace_bytes), "attention", "Plan every shape that is called."});
  if (call.result_rows() == 0) return;

  Carver carver(workspace);
  const ListOutput lists = call.lists(carver);
  const Results parts = call.parts(carver);
  Job job{};
  job.layer = a.layer;
  job.kv = a.kv;
  job.q = a.q;
  job.rows = call.rows;
  job.heads = call.heads;
  job.tile_rows = plan.tile_rows;
  job.tiles_per_row = static_cast<i32>(call.tiles_per_row);
  job.splits = plan.splits;
  job.split_queries = a.q.dtype != a.kv.dtype;
  job.vector_queries = !job.split_queries && aligned_queries(a.q);
  job.precise = a.precise;
  job.results = plan.splits > 1 ? parts : Results{out, lse, 0, a.q.count};

  if (!a.read) {
    launch_attention(call, job, call.rows.count(), stream);
  } else {
    job.lists = {lists.slot, lists.weight, lists.count, lists.stride};
    job.exact_window = a.read->exact_window;
    for (i64 begin = 0; begin < call.rows.count(); begin += plan.list_rows) {
      const i64 rows = std::min(plan.list_rows, call.rows.count() - begin);
      launch_lists(a, begin, rows, lists, stream);
      job.row_begin = begin;
      launch_attention(call, job, rows, stream);
    }
  }
  if (plan.splits > 1)
    launch_merge({parts.out, parts.lse, plan.splits, a.layer.head_dim, call.result_rows(), call.queries,
                  call.first_query, a.q.count, out, lse},
                 stream);
}

}  // namespace
}  // namespace cuda::attention

CudaAttentionPlan plan_cuda_attention(const Attention& a) { return cuda::attention::Call(a).plan; }

void attend_cuda(const Attention& a, float* out, float* lse, void* workspace, std::size_t workspace_bytes,
                 void* stream) {
  cuda::attention::enqueue(a, out, lse, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace lacuna
