// Top-k and top-p (or a mass) of rows without sorting them, a block a row: a radix descent (11 + 11 + 10 bits) finds
// the value of the last element taken, and one pass in index order writes what is above it and the first of its ties.
// Top-p descends by sums: values that share their leading eleven bits share the exponent, so their sums are exact in
// integers and do not depend on the order of the atomics. The mantissas are summed by halves of twelve bits, which 2^20
// elements do not overflow.
#include "lacuna/ops/cuda_ops.hpp"
#include "launch.cuh"
#include "ops/guarded.hpp"
#include "order.cuh"

namespace lacuna {
namespace cuda {
namespace {

constexpr int kBins = 1 << 11;
constexpr int kFewThreads = 256, kManyThreads = 1024;
constexpr int kFewItems = 4, kManyItems = 8;  // elements that a thread has in flight, and between two scans
constexpr i64 kShortRow = 4096;               // a row up to here is worth the few
constexpr int kHalf = 12;
constexpr i64 kLongestSum = 1 << 20;
constexpr u32 kInfinityDigit = 0xff800000u >> 21;

struct Pass {
  int shift, bits;
};
__device__ constexpr Pass kPasses[] = {{21, 11}, {10, 11}, {0, 10}};

// Of a key other than 0.
__device__ u32 bits_of(u32 key) { return key & 0x80000000u ? key ^ 0x80000000u : ~key; }

// A value is mantissa_of(key) * unit_of(key), and unit_of depends on the leading eleven bits alone.
__device__ u32 mantissa_of(u32 key) {
  const u32 bits = bits_of(key), fraction = bits & 0x7fffffu;
  return bits & 0x7f800000u ? fraction | 0x800000u : fraction;
}
__device__ double unit_of(u32 digit) {
  if (digit == kInfinityDigit) return INFINITY;
  const u32 bits = bits_of(digit << 21), exponent = bits >> 23 & 255u;
  const double unit = scalbn(1., static_cast<int>(max(exponent, 1u)) - 150);
  return bits & 0x80000000u ? -unit : unit;
}

struct Shared {
  u32 count[kBins];
  u32 low[kBins], high[kBins];  // sums of the mantissas' halves

  __device__ u64 sum(int bin) const { return (static_cast<u64>(high[bin]) << kHalf) + low[bin]; }
  u64 warp_sum[32];
  u32 totals[2][32];
  u32 digit;
  i32 wanted, length;
  u64 above;
  double before, target;
};

// Sum over the threads before this one; all threads. T: u32 or u64.
template <class T>
__device__ T exclusive_scan(T value, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T inclusive = value;
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) s.warp_sum[warp] = inclusive;
  __syncthreads();
  T before = 0;
  for (int w = 0; w < warps; ++w)
    if (w < warp) before += static_cast<T>(s.warp_sum[w]);
  __syncthreads();
  return before + inclusive - value;
}

// f(key, digit) for the elements whose digits above the pass are `prefix`. Loads first: nothing passes an atomic.
template <int kItems, class F>
__device__ void for_each_digit(const float* x, i32 n, int pass, u32 prefix, F f) {
  const auto [shift, bits] = kPasses[pass];
  const i32 step = static_cast<i32>(blockDim.x);
  for (i32 begin = static_cast<i32>(threadIdx.x); begin < n; begin += step * kItems) {
    float value[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) value[j] = begin + j * step < n ? x[begin + j * step] : 0.f;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const u32 key = key_of(value[j]);
      if (begin + j * step < n && (pass == 0 || key >> (shift + bits) == prefix))
        f(key, key >> shift & ((1u << bits) - 1));
    }
  }
}

template <int kItems>
__device__ void count_digits(const float* x, i32 n, int pass, u32 prefix, bool sums, Shared& s) {
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += static_cast<int>(blockDim.x)) {
    s.count[b] = 0;
    s.low[b] = s.high[b] = 0;
  }
  __syncthreads();
  for_each_digit<kItems>(x, n, pass, prefix, [&](u32 key, u32 digit) {
    atomicAdd(&s.count[digit], 1u);
    if (!sums || key == 0) return;
    atomicAdd(&s.low[digit], mantissa_of(key) & ((1u << kHalf) - 1));
    atomicAdd(&s.high[digit], mantissa_of(key) >> kHalf);
  });
  __syncthreads();
}

// The digit of the wanted-th largest element, and what is wanted of its elements: s.digit, s.wanted.
__device__ void descend(i32 wanted, Shared& s) {
  const int each = kBins / static_cast<int>(blockDim.x), top = kBins - 1 - static_cast<int>(threadIdx.x) * each;
  i32 held = 0;
  for (int b = top; b > top - each; --b) held += static_cast<i32>(s.count[b]);
  i32 above = static_cast<i32>(exclusive_scan<u32>(static_cast<u32>(held), s));
  if (above < wanted && above + held >= wanted) {
    int b = top;
    for (; above + static_cast<i32>(s.count[b]) < wanted; --b) above += static_cast<i32>(s.count[b]);
    s.digit = static_cast<u32>(b);
    s.wanted = wanted - above;
  }
  __syncthreads();
}

// Taken: every element with a larger key, and the first `ties` of those with this one.
struct Cut {
  u32 key;
  i32 ties;
};
__device__ constexpr Cut kTakeNothing{~0u, 0}, kTakeAll{0, 0};

template <int kItems>
__device__ Cut find_cut(const float* x, i32 n, i32 k, Shared& s) {
  u32 prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    count_digits<kItems>(x, n, pass, prefix, false, s);
    if (pass == 0) k = min(k, n - static_cast<i32>(s.count[0]));  // digit 0 holds what is never taken, and nothing else
    if (k <= 0) return kTakeNothing;
    descend(k, s);
    prefix = prefix << kPasses[pass].bits | s.digit;
    k = s.wanted;
    if (static_cast<i32>(s.count[s.digit]) == k) return {(prefix << kPasses[pass].shift) - 1, 0};  // all of the digit
  }
  return {prefix, k};
}

// Writes what is taken, ascending; returns how much.
template <int kItems>
__device__ i32 take(const float* x, i32 n, Cut cut, i32* out, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const u32 lower = (1u << lane) - 1;
  i32 above = 0, ties = 0;  // before this round
  int turn = 0;
  __syncthreads();
  for (i32 begin = 0; begin < n; begin += static_cast<i32>(blockDim.x) * kItems, turn ^= 1) {
    const i32 first = begin + warp * 32 * kItems + lane;
    u32 is_above[kItems], is_tie[kItems], packed = 0;  // of the warp; packed: ties << 16 | above
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const u32 key = first + 32 * j < n ? key_of(x[first + 32 * j]) : 0u;
      is_above[j] = __ballot_sync(~0u, key > cut.key);
      is_tie[j] = __ballot_sync(~0u, key == cut.key);
      packed += static_cast<u32>(__popc(is_tie[j])) << 16 | static_cast<u32>(__popc(is_above[j]));
    }
    if (lane == 0) s.totals[turn][warp] = packed;
    __syncthreads();
    u32 sum = lane < warps ? s.totals[turn][lane] : 0u;
    for (int d = 1; d < 32; d *= 2) {
      const u32 other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    const u32 before = __shfl_sync(~0u, sum, warp) - packed, all = __shfl_sync(~0u, sum, 31);
    i32 a = above + static_cast<i32>(before & 0xffffu), t = ties + static_cast<i32>(before >> 16);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const i32 a_here = a + __popc(is_above[j] & lower), t_here = t + __popc(is_tie[j] & lower);
      if ((is_above[j] >> lane & 1) || ((is_tie[j] >> lane & 1) && t_here < cut.ties))
        out[a_here + min(t_here, cut.ties)] = first + 32 * j;
      a += __popc(is_above[j]);
      t += __popc(is_tie[j]);
    }
    above += static_cast<i32>(all & 0xffffu);
    ties += static_cast<i32>(all >> 16);
  }
  return above + min(ties, cut.ties);
}

// Where a prefix ends: at a sum, `given` or a share of the row's own.
struct Goal {
  double share;
  const double* given;  // [rows]; null: the share
};

// Which leading digit's sum crosses the row's goal, in the CPU's order of additions: s.digit, and before it s.before
// and s.length elements. s.wanted: 0 if nothing is taken, -1 if everything is, else 1. Warp 0; the counts are of pass
// 0.
__device__ void find_crossing(const Goal& goal, i64 row, Shared& s) {
  const int lane = threadIdx.x % 32;
  const auto for_each_held = [&](auto f) {  // f(digit): whether to stop; descending
    for (int group = kBins - 32; group >= 0; group -= 32) {
      const int digit = group + 31 - lane;
      u32 held = __ballot_sync(~0u, digit > 0 && s.count[digit] > 0);
      for (; held != 0; held &= held - 1)
        if (f(group + 32 - __ffs(static_cast<int>(held)))) return true;
    }
    return false;
  };
  const auto sum_of = [&](int digit) { return static_cast<double>(s.sum(digit)) * unit_of(static_cast<u32>(digit)); };
  double target = 0;
  if (goal.given) {
    target = goal.given[row];
  } else {
    for_each_held([&](int digit) {
      target += sum_of(digit);
      return false;
    });
    target *= goal.share;
  }
  double before = 0;
  i32 length = 0;
  const bool any = before < target;
  int crossing = 0;
  const bool found = any && for_each_held([&](int digit) {
                       crossing = digit;
                       if (before + sum_of(digit) >= target) return true;
                       before += sum_of(digit);
                       length += static_cast<i32>(s.count[digit]);
                       return false;
                     });
  if (lane != 0) return;
  s.wanted = found ? 1 : any ? -1 : 0;
  s.digit = static_cast<u32>(crossing);
  s.before = before;
  s.length = length;
  s.target = target;
}

struct Prefix {
  Cut cut;
  i32 length;
};

// The shortest descending prefix that reaches the row's goal.
template <int kItems>
__device__ Prefix find_prefix(const float* x, i32 n, const Goal& goal, i64 row, Shared& s) {
  count_digits<kItems>(x, n, 0, 0, true, s);
  if (threadIdx.x < 32) find_crossing(goal, row, s);
  __syncthreads();
  if (s.wanted == 0) return {kTakeNothing, 0};
  if (s.wanted < 0) return {kTakeAll, n};
  const double before = s.before, target = s.target, unit = unit_of(s.digit);
  u32 prefix = s.digit;
  i32 length = s.length;
  u64 above = 0;  // of the leading digit, in units
  const auto reached = [&](u64 sum) { return before + static_cast<double>(sum) * unit >= target; };
  for (int pass = 1; pass < 3; ++pass) {
    count_digits<kItems>(x, n, pass, prefix, true, s);
    const int each = kBins / static_cast<int>(blockDim.x), top = kBins - 1 - static_cast<int>(threadIdx.x) * each;
    u64 held = 0;
    u32 elements = 0;
    for (int b = top; b > top - each; --b) {
      held += s.sum(b);
      elements += s.count[b];
    }
    u64 sum = above + exclusive_scan<u64>(held, s);
    i32 taken = length + static_cast<i32>(exclusive_scan<u32>(elements, s));
    if (!reached(sum) && reached(sum + held)) {
      int b = top;
      for (; !reached(sum + s.sum(b)); --b) {
        sum += s.sum(b);
        taken += static_cast<i32>(s.count[b]);
      }
      s.digit = static_cast<u32>(b);
      s.above = sum;
      s.length = taken;
    }
    __syncthreads();
    prefix = prefix << kPasses[pass].bits | s.digit;
    above = s.above;
    length = s.length;
  }
  i32 ties = 1;  // equal elements that are needed: the least that reach the target
  for (i32 enough = static_cast<i32>(s.count[s.digit]); ties < enough;) {
    const i32 middle = ties + (enough - ties) / 2;
    if (reached(above + static_cast<u64>(middle) * mantissa_of(prefix)))
      enough = middle;
    else
      ties = middle + 1;
  }
  return {{prefix, ties}, length + ties};
}

struct Top {
  const float* values;
  i64 stride;
  const i32 *n, *k;  // k null: no cap
  bool by_sum;
  Goal goal;
  i32 *out, *out_count;
  i64 out_stride;
};

template <int kItems, int kThreads>
__global__ void __launch_bounds__(kThreads) top_kernel(Top top) {
  __shared__ Shared s;
  const i64 row = blockIdx.x;
  const float* x = top.values + row * top.stride;
  const i32 n = top.n[row];
  const i32 k = top.k ? top.k[row] : n;
  const Prefix prefix = top.by_sum ? find_prefix<kItems>(x, n, top.goal, row, s) : Prefix{kTakeAll, n};
  const Cut cut = top.by_sum && prefix.length <= k ? prefix.cut : find_cut<kItems>(x, n, k, s);
  const i32 taken = take<kItems>(x, n, cut, top.out + row * top.out_stride, s);
  if (threadIdx.x == 0) top.out_count[row] = taken;
}

void check_sums(const char* op, i64 stride) {
  if (stride > kLongestSum)
    throw Error({"the rows are too long to be summed", "at most " + std::to_string(kLongestSum) + " values",
                 std::to_string(stride), op, ""});
}

void launch_top(const char* op, const sdk::Call& call, i32 rows, const Top& top) {
  if (top.stride <= kShortRow)
    launch(op, stream_of(call), top_kernel<kFewItems, kFewThreads>, rows, kFewThreads, 0, top);
  else
    launch(op, stream_of(call), top_kernel<kManyItems, kManyThreads>, rows, kManyThreads, 0, top);
}

}  // namespace
}  // namespace cuda

sdk::i32 CudaOps::topk(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const sdk::i32* k,
                       sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    cuda::launch_top("topk", call_, rows, {values, stride, n, k, false, {}, out, out_count, out_stride});
    cost_.bytes += 4. * rows * static_cast<double>(stride + out_stride);
  });
}

sdk::i32 CudaOps::topp(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const sdk::i32* k,
                       double p, sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
    cuda::check_sums("topp", stride);
    cuda::launch_top("topp", call_, rows, {values, stride, n, k, true, {p, nullptr}, out, out_count, out_stride});
    cost_.bytes += 4. * rows * static_cast<double>(stride + out_stride);
    cost_.flops += 2. * rows * static_cast<double>(stride);
  });
}

void CudaOps::top_mass(const float* values, sdk::i32 rows, sdk::i64 stride, const sdk::i32* n, const double* target,
                       sdk::i32* out, sdk::i32* out_count, sdk::i64 out_stride) {
  cuda::check_sums("top_mass", stride);
  cuda::launch_top("top_mass", call_, rows,
                   {values, stride, n, nullptr, true, {0., target}, out, out_count, out_stride});
  cost_.bytes += 4. * rows * static_cast<double>(stride + out_stride);
  cost_.flops += rows * static_cast<double>(stride);
}

}  // namespace lacuna
