// Top-k and top-p (or a mass) of rows without sorting them: a radix descent finds the value of the last element taken,
// and one pass in index order emits what is above it and the first of its ties.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "guarded.hpp"
#include "lacuna/ops/cpu_ops.hpp"
#include "lacuna/ops/simd.hpp"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;
using sdk::u32;

constexpr int kDigitBits = 11;
constexpr u32 kDigits = 1u << kDigitBits;
constexpr u32 kLeastKey = 0x00800000u;  // of the lowest finite value

// Larger values have larger keys, the two zeros the same one; -inf and NaN, which are never taken, have 0.
LACUNA_INLINE u32 key_of(float value) {
  const u32 bits = sdk::bits_of_float(value + 0.f);
  const u32 key = bits ^ (static_cast<u32>(static_cast<i32>(bits) >> 31) | 0x80000000u);
  return value > -std::numeric_limits<float>::infinity() ? key : 0u;
}

// The value of a key other than 0.
float value_of(u32 key) { return sdk::float_of_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

struct Cut {
  float value;  // of the last element taken
  i32 ties;     // elements of that value that are taken
};

// f(i, x[i]) for the elements of at least `least`, in order. Most blocks of a row hold none and are passed over at
// once.
template <class F>
void for_each_at_least(const float* x, i32 n, float least, F f) {
  constexpr i32 kBlock = 16;
  simd::multiversion([&](auto isa) LACUNA_INLINE_LAMBDA {
    constexpr int kWidth = simd::register_bytes(decltype(isa)::value) / 4;
    using Word = simd::Vector<i32, kWidth>;
    i32 i = 0;
    for (; i + kBlock <= n; i += kBlock) {
      Word hit = {};
      for (int v = 0; v < kBlock; v += kWidth)
        hit |= static_cast<Word>(simd::vector_at<const simd::Unaligned<float, kWidth>>(x + i + v) >= least);
      i64 any = 0;
      for (int w = 0; w < kWidth / 2; ++w) any |= reinterpret_cast<const simd::Vector<i64, kWidth / 2>&>(hit)[w];
      if (any == 0) continue;
      u32 members = 0;  // bits instead of branches, which would be guessed wrong
      for (i32 j = 0; j < kBlock; ++j) members |= static_cast<u32>(x[i + j] >= least) << j;
      for (; members != 0; members &= members - 1) {
        const i32 j = i + std::countr_zero(members);
        f(j, x[j]);
      }
    }
    for (; i < n; ++i)
      if (x[i] >= least) f(i, x[i]);
  });
}

// Histogram of the leading digit. Neighbours often share a digit, so four counters take turns.
void count_digits(const float* x, i32 n, u32* count) {
  std::vector<u32> turns(4 * kDigits, 0);
  i32 i = 0;
  for (; i + 4 <= n; i += 4)
    for (u32 t = 0; t < 4; ++t) ++turns[t * kDigits + (key_of(x[i + static_cast<i32>(t)]) >> 21)];
  for (; i < n; ++i) ++turns[key_of(x[i]) >> 21];
  for (u32 d = 0; d < kDigits; ++d)
    count[d] = turns[d] + turns[kDigits + d] + turns[2 * kDigits + d] + turns[3 * kDigits + d];
}

// The largest digit of count such that at most `wanted` - 1 elements lie above it; `wanted` becomes what it must give.
u32 descend(const u32* count, i32 digits, i32& wanted) {
  i32 d = digits - 1;
  for (; d > 0 && static_cast<i32>(count[d]) < wanted; --d) wanted -= static_cast<i32>(count[d]);
  return static_cast<u32>(d);
}

// The cut that takes k of the row's candidates; `count`: histogram of the leading digits; 1 <= k <= candidates.
Cut cut_at(const float* x, i32 n, i32 k, std::vector<u32>& count) {
  const u32 lead = descend(count.data(), kDigits, k);
  std::vector<u32> keys(count[lead] + 1);
  std::size_t filled = 0;
  for_each_at_least(x, n, value_of(std::max(lead << 21, kLeastKey)), [&](i32, float v) {
    const u32 key = key_of(v);
    keys[filled] = key;  // overwritten unless it belongs
    filled += key >> 21 == lead;
  });
  keys.pop_back();
  u32 prefix = lead;
  for (const int shift : {10, 0}) {
    const int bits = shift == 10 ? 11 : 10;
    std::fill(count.begin(), count.end(), 0u);
    for (const u32 key : keys) ++count[(key >> shift) & ((1u << bits) - 1)];
    prefix = prefix << bits | descend(count.data(), 1 << bits, k);
    std::erase_if(keys, [&](u32 key) { return key >> shift != prefix; });
  }
  return {value_of(prefix), k};
}

i32 topk_row(const float* x, i32 n, i32 k, i32* out) {
  std::vector<u32> count(kDigits);
  count_digits(x, n, count.data());
  k = std::min(k, n - static_cast<i32>(count[0]));  // digit 0 holds what is never taken, and nothing else
  if (k <= 0) return 0;
  Cut cut = cut_at(x, n, k, count);
  i32 taken = 0;
  for_each_at_least(x, n, cut.value, [&](i32 i, float v) {
    if (v > cut.value || cut.ties-- > 0) out[taken++] = i;
  });
  return taken;
}

// Sums and numbers of a row's candidates by leading digit. A digit's values share their exponent, so its sum is exact.
struct Digits {
  std::vector<double> sum = std::vector<double>(kDigits, 0.);
  std::vector<i32> count = std::vector<i32>(kDigits, 0);

  Digits(const float* x, i32 n) {
    for (i32 i = 0; i < n; ++i) {
      const u32 key = key_of(x[i]);
      if (key == 0) continue;
      sum[key >> 21] += x[i];
      ++count[key >> 21];
    }
  }
  // In prefix_length's order, so that a target of all of it takes everything that is not zero.
  double whole() const {
    double out = 0;
    for (u32 d = kDigits; d-- > 0;) out += sum[d];
    return out;
  }
};

// Elements of the shortest descending prefix that sums to `target`, all where none does. Sums go by leading digit,
// descending, and by element within the digit that crosses.
i32 prefix_length(const float* x, i32 n, const Digits& digits, double target) {
  double before = 0;
  i32 length = 0;
  if (!(before < target)) return 0;
  for (u32 d = kDigits; d-- > 0;) {
    if (before + digits.sum[d] < target) {
      before += digits.sum[d];
      length += digits.count[d];
      continue;
    }
    std::vector<float> inside;
    for (i32 i = 0; i < n; ++i)
      if (const u32 key = key_of(x[i]); key != 0 && key >> 21 == d) inside.push_back(x[i]);
    std::sort(inside.begin(), inside.end(), std::greater<>());
    for (const float v : inside) {
      ++length;
      before += v;
      if (before >= target) break;
    }
    break;
  }
  return length;
}

// Ranks by falling value, ties by rising index, of the candidates alone.
void rank_normalise_row(float* x, i32 n) {
  std::vector<i32> order;
  for (i32 i = 0; i < n; ++i)
    if (key_of(x[i]) != 0) order.push_back(i);
  std::sort(order.begin(), order.end(), [&](i32 a, i32 b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  for (std::size_t rank = 0; rank < order.size(); ++rank)
    if (float& v = x[order[rank]]; std::isfinite(v)) v = 1.f - static_cast<float>(rank) / static_cast<float>(n);
}

double total(const i32* n, i32 rows) {
  double sum = 0;
  for (i32 r = 0; r < rows; ++r) sum += n[r];
  return sum;
}

}  // namespace

i32 CpuOps::topk(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, i32* out, i32* out_count,
                 i64 out_stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
#pragma omp parallel for schedule(dynamic)
    for (i32 r = 0; r < rows; ++r) out_count[r] = topk_row(values + r * stride, n[r], k[r], out + r * out_stride);
    cost_.bytes += 4. * total(n, rows) + 4. * total(out_count, rows);
  });
}

i32 CpuOps::topp(const float* values, i32 rows, i64 stride, const i32* n, const i32* k, double p, i32* out,
                 i32* out_count, i64 out_stride, sdk::Error* error) noexcept {
  return guarded(error, [&] {
#pragma omp parallel for schedule(dynamic)
    for (i32 r = 0; r < rows; ++r) {
      const float* x = values + r * stride;
      const Digits digits(x, n[r]);
      const i32 length = prefix_length(x, n[r], digits, p * digits.whole());
      out_count[r] = topk_row(x, n[r], k ? std::min(k[r], length) : length, out + r * out_stride);
    }
    cost_.bytes += 4. * total(n, rows) + 4. * total(out_count, rows);
    cost_.flops += 2. * total(n, rows);
  });
}

void CpuOps::top_mass(const float* values, i32 rows, i64 stride, const i32* n, const double* target, i32* out,
                      i32* out_count, i64 out_stride) {
#pragma omp parallel for schedule(dynamic)
  for (i32 r = 0; r < rows; ++r) {
    const float* x = values + r * stride;
    const i32 length = target[r] > 0 ? prefix_length(x, n[r], Digits(x, n[r]), target[r]) : 0;
    out_count[r] = topk_row(x, n[r], length, out + r * out_stride);
  }
  cost_.bytes += 4. * total(n, rows) + 4. * total(out_count, rows);
  cost_.flops += total(n, rows);
}

void CpuOps::rank_normalise(float* values, i32 rows, i64 stride, const i32* n) {
#pragma omp parallel for schedule(dynamic)
  for (i32 r = 0; r < rows; ++r) rank_normalise_row(values + r * stride, n[r]);
  cost_.bytes += 8. * total(n, rows);
}

}  // namespace lacuna
