// What a row of a selection reads, as one ascending list of distinct slots: the GPU's expand_row and RowSet::cells.
//
// A thread block a row: pieces and tokens set bits of a map in shared memory, then every warp counts the bits of its
// words and writes their slots behind those of the warps before it. Caches longer than the map go through it in turns.
// With log weights a second pass finds the entry that decides each slot's weight: the covering piece that starts first,
// the one listed first among those, else the token listed first; the smallest of keys that order them so, by atomic
// minimum, which is the same in whatever order they come.
#include "launch.hpp"

namespace lacuna::cuda::attention {
namespace {

using sdk::u32;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr i32 kWords = 8192, kMapSlots = 32 * kWords;
constexpr u32 kTokenRank = ~0u;  // behind every piece's start
constexpr OwnerKey kNobody = ~0ull;

/// Bits [begin, end) of a word that holds slots from `base` on.
__device__ u32 range_bits(i64 base, i64 begin, i64 end) {
  const i64 lo = max(begin - base, i64{0}), hi = min(end - base, i64{32});
  if (lo >= hi) return 0;
  return (~0u >> (32 - (hi - lo))) << lo;
}

/// Ascends with `start`.
__device__ OwnerKey owner_key(i32 start, i32 place) {
  return static_cast<OwnerKey>(static_cast<u32>(start) ^ 0x80000000u) << 32 | static_cast<u32>(place);
}
__device__ OwnerKey token_key(i32 place) { return static_cast<OwnerKey>(kTokenRank) << 32 | static_cast<u32>(place); }

/// One row's lists and its place among the queries.
struct ListRow {
  const i32 *pieces, *tokens;
  i32 num_pieces, num_tokens, kv_block;
  i32 visible;              // slots that the row's last query sees
  i32 sinks, window_begin;  // exact parts: slots [0, sinks) and [window_begin, visible)

  __device__ i64 piece_end(i32 p) const {
    return min(static_cast<i64>(pieces[p]) + kv_block, static_cast<i64>(visible));
  }
};

__device__ ListRow list_row(const sdk::Selection& s, i64 row, i32 length, i64 queries) {
  ListRow r{};
  r.pieces = s.pieces + row * s.piece_capacity;
  r.tokens = s.tokens + row * s.token_capacity;
  r.num_pieces = s.piece_count ? s.piece_count[row] : 0;
  r.num_tokens = s.token_count ? s.token_count[row] : 0;
  r.kv_block = s.kv_block;
  const i64 first_slot = length - queries + s.rows.query_begin(row);
  r.visible = static_cast<i32>(max(length - queries + s.rows.query_end(row), i64{0}));
  r.sinks = s.exact_sinks ? min(s.exact_sinks[row], r.visible) : 0;
  const i32 window = s.exact_window ? s.exact_window[row] : 0;
  r.window_begin = window > 0 ? static_cast<i32>(max(first_slot - window + 1, static_cast<i64>(r.sinks))) : r.visible;
  return r;
}

/// Sets the bits of the row's pieces and tokens that lie in the map, which begins at slot `base`.
__device__ void mark_members(const ListRow& r, i64 base, i32 words, u32* map) {
  const i64 map_end = base + 32ll * words;
  for (i32 p = static_cast<i32>(threadIdx.x); p < r.num_pieces; p += kThreads) {
    const i64 begin = max(static_cast<i64>(r.pieces[p]), base), end = min(r.piece_end(p), map_end);
    for (i64 w = (begin - base) / 32; base + 32 * w < end; ++w)
      atomicOr(map + w, range_bits(base + 32 * w, begin, end));
  }
  for (i32 t = static_cast<i32>(threadIdx.x); t < r.num_tokens; t += kThreads) {
    const i64 slot = r.tokens[t];
    if (slot >= base && slot < min(map_end, static_cast<i64>(r.visible)))
      atomicOr(map + (slot - base) / 32, 1u << slot % 32);
  }
}

/// Entry of the list, ascending by slot, at which `slot` stands.
__device__ i32 entry_of(const i32* list, i32 count, i32 slot) {
  i32 lo = 0, hi = count;
  while (lo < hi) {
    const i32 mid = (lo + hi) / 2;
    if ((list[mid] & kSlotMask) < slot)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

__device__ void write_weights(const sdk::Selection& s, i64 row, const ListRow& r, const i32* list, i32 count,
                              OwnerKey* owner, float* weight) {
  const i32 thread = static_cast<i32>(threadIdx.x);
  for (i32 n = thread; n < count; n += kThreads) owner[n] = kNobody;
  __syncthreads();
  for (i32 p = thread; p < r.num_pieces; p += kThreads) {
    const i32 begin = max(r.pieces[p], 0);
    const i64 members = r.piece_end(p) - begin;  // consecutive slots, so consecutive entries
    if (members <= 0) continue;
    const i32 at = entry_of(list, count, begin);
    for (i64 n = 0; n < members; ++n) atomicMin(owner + at + n, owner_key(r.pieces[p], p));
  }
  for (i32 t = thread; t < r.num_tokens; t += kThreads)
    if (r.tokens[t] >= 0 && r.tokens[t] < r.visible)
      atomicMin(owner + entry_of(list, count, r.tokens[t]), token_key(t));
  __syncthreads();
  for (i32 n = thread; n < count; n += kThreads) {
    const OwnerKey by = owner[n];
    const i64 place = static_cast<u32>(by);
    float w = 0.f;
    if (by != kNobody && by >> 32 == kTokenRank)
      w = s.token_log_weight ? s.token_log_weight[row * s.token_capacity + place] : 0.f;
    else if (by != kNobody)
      w = s.piece_log_weight ? s.piece_log_weight[row * s.piece_capacity + place] : 0.f;
    weight[n] = w;
  }
}

__global__ __launch_bounds__(kThreads) void lists_kernel(const __grid_constant__ sdk::Selection s, i64 row_begin,
                                                         const i32* length, i32 num_kv_heads, ListOutput out) {
  __shared__ u32 map[kWords];
  __shared__ i32 warp_count[kWarps];
  const i64 local = blockIdx.x, row = row_begin + local;
  if (s.full && s.full[row]) {
    if (threadIdx.x == 0) out.count[local] = kFullRow;
    return;
  }
  const ListRow r = list_row(s, row, length[s.rows.kv_row(row, num_kv_heads)], s.rows.num_queries);
  i32* list = out.slot + local * out.stride;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  i32 total = 0;
  for (i64 base = 0; base < r.visible; base += kMapSlots) {
    const i32 words = static_cast<i32>(min((r.visible - base + 31) / 32, static_cast<i64>(kWords)));
    for (i32 w = thread; w < words; w += kThreads) map[w] = 0;
    __syncthreads();
    mark_members(r, base, words, map);
    __syncthreads();

    const i32 share = (words + kWarps - 1) / kWarps, first = min(warp * share, words), last = min(first + share, words);
    const auto sinks_of = [&](i32 w) { return range_bits(base + 32ll * w, 0, r.sinks); };
    const auto window_of = [&](i32 w) { return range_bits(base + 32ll * w, r.window_begin, r.visible); };
    i32 count = 0;
    for (i32 w = first + lane; w < last; w += 32) count += __popc(map[w] | sinks_of(w) | window_of(w));
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(~0u, count, step);
    if (lane == 0) warp_count[warp] = count;
    __syncthreads();
    i32 at = total;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += warp_count[w];
      total += warp_count[w];
    }
    for (i32 begin = first; begin < last; begin += 32) {  // a lane a word, then the warp a word that is not empty
      const i32 w = begin + lane;
      const u32 always = w < last ? map[w] | sinks_of(w) : 0, all = w < last ? always | window_of(w) : 0;
      i32 up_to = __popc(all);
      for (int step = 1; step < 32; step *= 2) {
        const i32 lower = __shfl_up_sync(~0u, up_to, step);
        if (lane >= step) up_to += lower;
      }
      const i32 before = at + up_to - __popc(all);
      for (u32 left = __ballot_sync(~0u, all != 0); left != 0; left &= left - 1) {
        const int source = __ffs(static_cast<int>(left)) - 1;
        const u32 bits = __shfl_sync(~0u, all, source), kept = __shfl_sync(~0u, always, source);
        const i32 to = __shfl_sync(~0u, before, source) + __popc(bits & ((1u << lane) - 1));
        const i32 slot = static_cast<i32>(base + 32ll * (begin + source) + lane);
        if (bits >> lane & 1) list[to] = kept >> lane & 1 ? slot : slot | ~kSlotMask;
      }
      at += __shfl_sync(~0u, up_to, 31);
    }
    __syncthreads();  // before the map and the counts are written again
  }
  if (thread == 0) out.count[local] = total;
  if (out.weight)
    write_weights(s, row, r, list, total, out.owner + local * out.stride, out.weight + local * out.stride);
}

}  // namespace

void launch_lists(const Attention& a, i64 row_begin, i64 rows, const ListOutput& out, cudaStream_t stream) {
  lists_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(*a.read, row_begin, a.kv.length,
                                                                     a.layer.num_kv_heads, out);
  check_launch("key lists of a selection");
}

}  // namespace lacuna::cuda::attention

namespace lacuna {

void list_keys_cuda(const Attention& a, sdk::i32* slot, float* weight, sdk::i32* count, sdk::i64 stride, void* owners,
                    void* stream) {
  cuda::attention::ListOutput out{};
  out.slot = slot;
  out.count = count;
  out.stride = stride;
  if (weight) {
    out.weight = weight;
    out.owner = static_cast<cuda::attention::OwnerKey*>(owners);
  }
  cuda::attention::launch_lists(a, 0, a.read->rows.count(), out, static_cast<cudaStream_t>(stream));
}

}  // namespace lacuna
