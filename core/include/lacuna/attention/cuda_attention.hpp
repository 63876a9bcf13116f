// Attention on the GPU: what attend() computes, on arrays in device memory, by tensor cores where they serve.
#pragma once

#include <cstddef>

#include "lacuna/attention/attention.hpp"

namespace lacuna {

/// How attend_cuda does a call of this shape.
struct CudaAttentionPlan {
  std::size_t workspace_bytes;  // that attend_cuda needs
  bool tensor_cores;            // else the generic kernel: fp32 caches, head sizes other than 64, 128 and 256
  sdk::i32 tile_rows;           // (query, head) rows that read a block of keys together
  sdk::i32 splits;              // parts into which the keys of a tile are cut; more than 1: a merge kernel follows
  sdk::i64 list_rows;           // selection rows whose key lists exist at a time; 0: dense
};

/// Looks at the shapes in `a` and at which pointers are null, follows none of them and needs no GPU: any non-null
/// pointers do. The plan depends on nothing else, so a call gives the same bits on every GPU of an architecture. A call
/// of another shape may need more, also when it has fewer queries (it is cut along the keys instead): plan every shape,
/// allocate the largest. Throws Error for shapes that do not fit together.
CudaAttentionPlan plan_cuda_attention(const Attention& a);

/// attend() of attention.hpp with every pointer of `a`, `a.read` itself excepted, in device memory: cache, queries and
/// the selection's arrays; out and lse likewise (K, V and out 16-byte aligned). `workspace`:
/// plan_cuda_attention(a).workspace_bytes of device memory, 256-byte aligned; its content matters neither before nor
/// after. Enqueues kernels on `stream` (a cudaStream_t) of the current device; allocates nothing, never synchronises,
/// so it can be captured in a CUDA graph. Such a graph reads lengths, tables and lists anew at each replay; what is in
/// `a` itself (max_length, queries' positions) stays.
///
/// Selections are read as ascending lists of distinct slots, which a kernel makes per row, `list_rows` rows at a time:
/// 4 bytes (16 with log weights) a slot of max_length, at most 512 MiB or one row; nothing of size queries x keys.
///
/// Tensor cores: queries of the cache's dtype are taken as they are; others are split into a sum of two numbers of it
/// (bf16: 16 bits of mantissa; fp16: 22, magnitudes above 65504 overflow). Logits and sums are fp32, probabilities are
/// rounded to the cache's dtype before they meet V: |out - exact| <= 4e-3 * sum p ||v||, |lse - exact| <= 2e-3 while
/// sum |q_c k_c| stays below about 1e3 / softmax_scale. With a.precise they are split as such queries are, and meet V
/// twice: |out - exact| <= 4e-5 * sum p ||v|| on a bf16 cache. The same call gives the same bits.
///
/// Lengths are not checked: a query before its row's slot 0 reads nothing. Throws Error for shapes that do not fit
/// together, too small a workspace, or a failed launch.
void attend_cuda(const Attention& a, float* out, float* lse, void* workspace, std::size_t workspace_bytes,
                 void* stream);

/// What each row of a.read holds, as ascending lists of distinct slots [rows, stride >= max_length]: an entry is a
/// slot, with its sign bit set where only the exact window holds it. count [rows]; -1: a full row, nothing is listed.
/// weight [rows, stride] log weights, or null; `owners`: rows * stride * 8 bytes that it needs besides. Device memory;
/// enqueues as attend_cuda.
void list_keys_cuda(const Attention& a, sdk::i32* slot, float* weight, sdk::i32* count, sdk::i64 stride, void* owners,
                    void* stream);

}  // namespace lacuna
