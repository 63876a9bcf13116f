#include "lacuna/ops/tile.hpp"

#include <cmath>
#include <limits>
#include <numeric>

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNoCell = -std::numeric_limits<float>::max();  // maximum of a lane that has read nothing: finite, so
                                                                // that differences with it are no NaN
constexpr double kNarrowLogit = 64.;                            // fp32 sums are good enough below
constexpr i32 kAlways = std::numeric_limits<i32>::max();

// The same number of lanes in T, i32 and float.
template <class T, simd::Isa isa>
struct Lanes {
  static constexpr int count = simd::register_bytes(isa) / static_cast<int>(sizeof(T));
  using Real = simd::Vector<T, count>;
  using Single = simd::Vector<float, count>;
  using Word = simd::Vector<i32, count>;
  using Mask = simd::Vector<std::conditional_t<sizeof(T) == 8, i64, i32>, count>;
};

}  // namespace

KeyList dense_keys(const sdk::Paged& kv, i64 row, i64 begin, i64 end, i64 sliding_window) {
  KeyList out;
  i64 first = 0;
  if (sliding_window > 0) first = kv.visible(row, static_cast<i64>(kv.position_of(row, begin)) - sliding_window);
  out.slot.resize(static_cast<std::size_t>(end - first));
  std::iota(out.slot.begin(), out.slot.end(), static_cast<i32>(first));
  out.until.assign(out.slot.size(), kAlways);
  if (sliding_window > 0) {
    i64 s = begin;  // positions ascend, so the first query that no longer sees a key does too
    for (i64 j = first; j < end; ++j) {
      const i64 limit = kv.position_of(row, j) + sliding_window;
      while (s < end && kv.position_of(row, s) < limit) ++s;
      if (s < end) out.until[static_cast<std::size_t>(j - first)] = static_cast<i32>(s);
    }
  }
  return out;
}

KeyList set_keys(const RowSet& set, i64 begin, i64 end, bool weighted) {
  KeyList out;
  weighted = weighted && !set.log_weight.empty();
  out.slot = set.exact_sinks || set.exact_window ? set.cells(begin, end) : set.slots;
  if (out.slot.size() && out.slot.back() >= end)
    out.slot.resize(
        static_cast<std::size_t>(std::lower_bound(out.slot.begin(), out.slot.end(), end) - out.slot.begin()));
  out.until.resize(out.slot.size());
  if (weighted) out.log_weight.resize(out.slot.size());
  std::size_t m = 0;
  for (std::size_t i = 0; i < out.slot.size(); ++i) {
    const i32 slot = out.slot[i];
    while (m < set.slots.size() && set.slots[m] < slot) ++m;
    const bool member = m < set.slots.size() && set.slots[m] == slot;
    const i64 until = member || slot < set.exact_sinks ? kAlways : static_cast<i64>(slot) + set.exact_window;
    out.until[i] = static_cast<i32>(std::min<i64>(until, kAlways));
    if (weighted) out.log_weight[i] = member ? set.log_weight[m] : 0.f;
  }
  return out;
}

void Tile::load_queries(const sdk::Queries& q, const TileQueries& which, const std::vector<i32>& slots, double scale) {
  which_ = which;
  scale_ = scale;
  head_dim_ = q.head_dim;
  depth_ = round_up(head_dim_, kRowStep);
  const i64 n = which.count();
  head_stride_ = n < kLaneStep ? n : round_up<i64>(n, kLaneStep);
  lanes_ = head_stride_ * which.heads;
  padded_ = round_up<i64>(lanes_, kLaneStep);
  wide_queries_ready_ = false;

  first_slot_ = slots.front();
  last_slot_ = slots.back();
  const auto padded = static_cast<std::size_t>(padded_);
  lane_slot_.assign(padded, last_slot_);
  top_.assign(padded, kNoCell);
  sum_.assign(padded, 0.);
  lse_.assign(padded, kInfinity);
  const auto elements = padded * static_cast<std::size_t>(depth_);
  raw_q_.assign(elements, 0.f);
  q_.resize(elements);
  out_.assign(elements, 0.f);

  std::vector<float> row(static_cast<std::size_t>(head_dim_));
  double largest = 0;
  for (i64 h = 0; h < which.heads; ++h)
    for (i64 i = 0; i < n; ++i) {
      const i64 l = lane(h, i), group = l / kLanes, w = width(static_cast<int>(group));
      lane_slot_[static_cast<std::size_t>(l)] = slots[static_cast<std::size_t>(i)];
      convert_row(q.data, q.dtype,
                  which.seq * q.seq_stride + (which.head_begin + h) * q.head_stride + (which.begin + i) * q.row_stride,
                  head_dim_, row.data());
      float* column = raw_q_.data() + group * kLanes * depth_ + l % kLanes;
      double squares = 0;
      for (int c = 0; c < head_dim_; ++c) {
        column[c * w] = row[static_cast<std::size_t>(c)];
        squares += static_cast<double>(row[static_cast<std::size_t>(c)]) * row[static_cast<std::size_t>(c)];
      }
      if (!(squares <= largest)) largest = squares;
    }
  query_norm_ = std::sqrt(largest) * std::abs(scale);
  for (std::size_t e = 0; e < elements; ++e) q_[e] = static_cast<float>(scale * raw_q_[e]);

  k_.resize(static_cast<std::size_t>(kKeys * depth_));
  v_.resize(k_.size());
  logits_.resize(kKeys * kLanes);
  p_.resize(kKeys * kLanes);
  keep_.resize(kLanes);
}

void Tile::widen_queries() {
  wide_q_.resize(raw_q_.size());
  for (std::size_t e = 0; e < raw_q_.size(); ++e) wide_q_[e] = scale_ * raw_q_[e];
  wide_k_.resize(k_.size());
  wide_logits_.resize(kKeys * kLanes);
  wide_queries_ready_ = true;
}

void Tile::load_keys(const sdk::Paged& kv, const KeyList& keys, i64 begin, int n, bool values) {
  keys_ = &keys;
  key_begin_ = begin;
  num_keys_ = n;
  values_ = values;
  const i32* slot = keys.slot.data() + begin;
  const i32* until = keys.until.data() + begin;
  i64 element[kKeys];
  bool everyone = slot[n - 1] <= first_slot_;
  for (int j = 0; j < n; ++j) {
    element[j] = kv.physical(which_.kv_row, slot[j]) * kv.head_dim;
    everyone = everyone && until[j] > last_slot_;
  }
  masked_ = !everyone || !keys.log_weight.empty();
  const double norm = convert_rows(kv.k, kv.dtype, element, n, head_dim_, k_.data(), depth_);
  std::fill(k_.begin() + n * depth_, k_.begin() + round_up(n, kRowStep) * depth_, 0.f);
  if (values) convert_rows(kv.v, kv.dtype, element, n, head_dim_, v_.data(), depth_);
  wide_ = !(norm * query_norm_ <= kNarrowLogit);
  if (wide_) {
    if (!wide_queries_ready_) widen_queries();
    std::copy(k_.begin(), k_.begin() + round_up(n, kRowStep) * depth_, wide_k_.begin());
  }
}

template <class T>
void Tile::logits(int group, T* s) {
  const i64 at = static_cast<i64>(group) * kLanes * depth_;
  const int rows = round_up(num_keys_, kRowStep);
  if constexpr (sizeof(T) == 8)
    multiply<T>(wide_k_.data(), depth_, 1, rows, depth_, wide_q_.data() + at, width(group), s, nullptr);
  else
    multiply<T>(k_.data(), depth_, 1, rows, depth_, q_.data() + at, width(group), s, nullptr);
  if (masked_) mask(group, s);
}

template <class T>
void Tile::mask(int group, T* s) const {
  const int w = width(group), n = num_keys_;
  const i32* lane_slot = lane_slot_.data() + group * kLanes;
  const i32* slot = keys_->slot.data() + key_begin_;
  const i32* until = keys_->until.data() + key_begin_;
  const float* weight = keys_->log_weight.empty() ? nullptr : keys_->log_weight.data() + key_begin_;
  simd::multiversion([=](auto isa) LACUNA_INLINE_LAMBDA {
    using L = Lanes<T, decltype(isa)::value>;
    const typename L::Real nothing = typename L::Real{} - static_cast<T>(kInfinity);
    for (int j = 0; j < n; ++j) {
      const T extra = weight ? weight[j] : T{0};
      for (int l = 0; l < w; l += L::count) {
        const auto& at = simd::vector_at<const simd::Unaligned<i32, L::count>>(lane_slot + l);
        const typename L::Word seen = (at >= slot[j]) & (at < until[j]);
        auto& x = simd::vector_at<typename L::Real>(s + j * w + l);
        x = __builtin_convertvector(seen, typename L::Mask) ? x + extra : nothing;
      }
    }
  });
}

// For each lane: the new maximum, p = exp(logit - maximum), their sum, and what the old sums are worth under it.
template <class T>
void Tile::soften(int group, T* s) {
  const int w = width(group), n = num_keys_;
  double *top = top_.data() + group * kLanes, *sum = sum_.data() + group * kLanes;
  float *p = p_.data(), *keep = keep_.data();
  simd::multiversion([=](auto isa) LACUNA_INLINE_LAMBDA {
    using L = Lanes<T, decltype(isa)::value>;
    using Real = typename L::Real;
    using Single = typename L::Single;
    constexpr int kCount = L::count;
    for (int l = 0; l < w; l += kCount) {
      alignas(64) T most[kCount];
      for (int i = 0; i < kCount; ++i) most[i] = static_cast<T>(top[l + i]);
      Real a = simd::vector_at<const Real>(most), b = a;  // two chains hide the latency
      int j = 0;
      for (; j + 2 <= n; j += 2) {
        const Real x = simd::vector_at<const Real>(s + j * w + l), y = simd::vector_at<const Real>(s + (j + 1) * w + l);
        a = x > a ? x : a;
        b = y > b ? y : b;
      }
      if (j < n) {
        const Real x = simd::vector_at<const Real>(s + j * w + l);
        a = x > a ? x : a;
      }
      a = b > a ? b : a;
      simd::vector_at<Real>(most) = a;

      alignas(64) float ratio[kCount];
      for (int i = 0; i < kCount; ++i) ratio[i] = static_cast<float>(top[l + i] - most[i]);
      simd::exp<kCount>(simd::vector_at<Single>(ratio));
      Single total = {};
      for (j = 0; j < n; ++j) {
        Single x = __builtin_convertvector(simd::vector_at<const Real>(s + j * w + l) - a, Single);
        simd::exp<kCount>(x);
        total += x;
        simd::vector_at<Single>(p + j * w + l) = x;
      }
      for (int i = 0; i < kCount; ++i) {
        top[l + i] = most[i];
        sum[l + i] = sum[l + i] * ratio[i] + total[i];
        keep[l + i] = ratio[i];
      }
    }
  });
}

template <class T>
void Tile::exponentiate(int group, const T* s) {
  const int w = width(group), n = num_keys_;
  const double* lse = lse_.data() + group * kLanes;
  float* p = p_.data();
  simd::multiversion([=](auto isa) LACUNA_INLINE_LAMBDA {
    using L = Lanes<T, decltype(isa)::value>;
    for (int l = 0; l < w; l += L::count) {
      alignas(64) T less[L::count];
      for (int i = 0; i < L::count; ++i) less[i] = static_cast<T>(lse[l + i] == -kInfinity ? kInfinity : lse[l + i]);
      for (int j = 0; j < n; ++j) {
        typename L::Single x = __builtin_convertvector(
            simd::vector_at<const typename L::Real>(s + j * w + l) - simd::vector_at<const typename L::Real>(less),
            typename L::Single);
        simd::exp<L::count>(x);
        simd::vector_at<typename L::Single>(p + j * w + l) = x;
      }
    }
  });
}

void Tile::online(int group) {
  if (wide_) {
    logits(group, wide_logits_.data());
    soften(group, wide_logits_.data());
  } else {
    logits(group, logits_.data());
    soften(group, logits_.data());
  }
  if (values_)
    multiply<float>(v_.data(), 1, depth_, depth_, num_keys_, p_.data(), width(group),
                    out_.data() + static_cast<i64>(group) * kLanes * depth_, keep_.data());
}

void Tile::probabilities(int group) {
  if (wide_) {
    logits(group, wide_logits_.data());
    exponentiate(group, wide_logits_.data());
  } else {
    logits(group, logits_.data());
    exponentiate(group, logits_.data());
  }
}

void Tile::reduce(int group, bool maximum, double* out, i64 out_stride) const {
  const int w = width(group);
  const i64 n = which_.count();
  for (i64 l = 0; l < w;) {
    const i64 h = (group * kLanes + l) / head_stride_, i = (group * kLanes + l) % head_stride_;
    if (h >= which_.heads) break;
    const i64 end = std::min<i64>(w, l + head_stride_ - i), real = std::min<i64>(end, l + std::max<i64>(0, n - i));
    for (int j = 0; j < num_keys_; ++j) {
      const float* p = p_.data() + j * w;
      double& total = out[h * out_stride + j];
      if (maximum) {
        for (i64 x = l; x < real; ++x) total = std::max(total, static_cast<double>(p[x]));
      } else {
        float part[4] = {};
        i64 x = l;
        for (; x + 4 <= real; x += 4)
          for (int y = 0; y < 4; ++y) part[y] += p[x + y];
        for (; x < real; ++x) part[0] += p[x];
        total += (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
    l = end;
  }
}

const std::vector<double>& Tile::finish() {
  for (std::size_t l = 0; l < lse_.size(); ++l) lse_[l] = sum_[l] == 0. ? -kInfinity : top_[l] + std::log(sum_[l]);
  return lse_;
}

void Tile::output(i64 lane, float* out) const {
  const i64 group = lane / kLanes, w = width(static_cast<int>(group));
  const double sum = sum_[static_cast<std::size_t>(lane)];
  const float* column = out_.data() + group * kLanes * depth_ + lane % kLanes;
  for (int c = 0; c < head_dim_; ++c) out[c] = sum == 0. ? 0.f : static_cast<float>(column[c * w] / sum);
}

}  // namespace lacuna
