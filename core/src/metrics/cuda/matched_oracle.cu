// The matched oracle by ranges of query tiles. A row (query head, tile) of columns takes its masses from the tensor
// cores, is sorted by density, and one block walks it once, with running sums of cost and mass in fp64, and answers all
// methods where their pairs run out. Methods with exact windows are answered again over the columns outside those: only
// the few that a window cuts have another mass, which is computed cell by cell in fp64.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "lacuna/metrics/cuda_oracle.hpp"
#include "layer_mass.cuh"
#include "metrics/tile_columns.hpp"
#include "ops/cuda/order.cuh"
#include "ops/cuda/segmented_sort.cuh"

namespace lacuna {
namespace {

using sdk::i32;
using sdk::i64;
using sdk::u32;

constexpr const char* kOp = "matched_oracle";
constexpr int kThreads = 256, kItems = 8, kChunk = kThreads * kItems;
constexpr i64 kUnasked = -1;  // pairs of a method that does not ask about a row

/// Rows [heads, tiles] of a range of tiles; `all_tiles` of the call.
struct RangeRows {
  i64 length, queries, stride;  // stride: columns of the longest row
  i32 q_tile, tile_begin, tiles, all_tiles;
  const float* mass;          // [rows, stride]
  const i32 *sinks, *window;  // [heads, all_tiles] exact cells that are left out; null: none
  const double* inside;       // [rows, q_tile] mass of the cut columns within the window

  __host__ __device__ i64 row_of_call(i64 row) const { return row / tiles * all_tiles + tile_begin + row % tiles; }
  __host__ __device__ TileColumns visible(i64 row) const {
    const i64 begin = (tile_begin + row % tiles) * static_cast<i64>(q_tile), end = begin + q_tile;
    return {length - queries + begin, length - queries + (end < queries ? end : queries)};
  }
  __device__ TileColumns columns(i64 row) const {
    TileColumns out = visible(row);
    if (window) {
      out.sinks = sinks[row_of_call(row)];
      out.window = window[row_of_call(row)];
    }
    return out;
  }
  __device__ double mass_of(i64 row, const TileColumns& columns, i64 slot) const {
    const double whole = mass[row * stride + slot];
    return slot < columns.cut() ? whole : max(0., whole - inside[row * q_tile + slot - columns.cut()]);
  }
};

struct SegmentBegin {
  RangeRows rows;
  __device__ i32 operator()(i32 row) const { return static_cast<i32>(row * rows.stride + rows.columns(row).begin()); }
};
struct SegmentEnd {
  RangeRows rows;
  __device__ i32 operator()(i32 row) const { return static_cast<i32>(row * rows.stride + rows.columns(row).past()); }
};

/// A block a row, a warp a cut column: its mass over the queries that hold it in the window.
__global__ void inside_kernel(RangeRows rows, cuda::Mass m, double* inside) {
  constexpr int kEach = cuda::kMaxHeadDim / 32;
  const i64 row = blockIdx.x, head = row / rows.tiles, kv_row = head / m.group;
  const TileColumns columns = rows.columns(row);
  const int lane = cuda::lane_id(), depth = m.q.head_dim;
  for (i64 slot = columns.cut() + cuda::warp_id(); slot < columns.past(); slot += cuda::kWarps) {
    const i64 element = cuda::key_element(m.kv, kv_row, static_cast<i32>(slot));
    double key[kEach];
    for (int e = 0; e < kEach; ++e) {
      const int c = lane + 32 * e;
      key[e] = c < depth ? sdk::load(m.kv.k, m.kv.dtype, element + c) : 0.f;
    }
    double sum = 0;
    for (i64 at = max(columns.first, slot); at < min(columns.end, slot + columns.window); ++at) {
      const i64 query = at - (rows.length - rows.queries), first = m.query_element(head, query);
      double product = 0;
      for (int e = 0; e < kEach; ++e)
        if (const int c = lane + 32 * e; c < depth)
          product += key[e] * static_cast<double>(sdk::load(m.q.data, m.q.dtype, first + c));
      for (int mask = 16; mask >= 1; mask /= 2) product += __shfl_xor_sync(~0u, product, mask);
      sum += exp2(product * m.scale - m.lse[head * m.count + query]);
    }
    if (lane == 0) inside[row * rows.q_tile + slot - columns.cut()] = sum;
  }
}

/// Ascending keys are descending densities.
__global__ void density_kernel(RangeRows rows, i64 elements, u32* key, i32* slot_of) {
  const i64 e = blockIdx.x * static_cast<i64>(kThreads) + threadIdx.x;
  if (e >= elements) return;
  const i64 row = e / rows.stride, slot = e % rows.stride;
  const TileColumns columns = rows.columns(row);
  if (slot < columns.begin() || slot >= columns.past()) return;
  const double density = rows.mass_of(row, columns, slot) / static_cast<double>(columns.cost(slot));
  key[e] = ~cuda::key_of(static_cast<float>(density));
  slot_of[e] = static_cast<i32>(slot);
}

/// A block a row. best [methods, rows]: mass of the columns that pairs [methods, rows] pay for; total [rows]: of all.
__global__ void __launch_bounds__(kThreads) answer_kernel(RangeRows rows, i64 count, const i32* slot_of, i64 methods,
                                                          const i64* pairs, double* best, double* total) {
  using CostScan = cub::BlockScan<i64, kThreads>;
  using MassScan = cub::BlockScan<double, kThreads>;
  __shared__ union {
    typename CostScan::TempStorage cost;
    typename MassScan::TempStorage mass;
  } scan;
  __shared__ i64 cost_after[kChunk];  // in the chunk
  __shared__ double mass_after[kChunk];
  const i64 row = blockIdx.x;
  const TileColumns columns = rows.columns(row);
  const int thread = static_cast<int>(threadIdx.x);
  i64 cost_before = 0;
  double mass_before = 0;
  for (i64 begin = columns.begin(); begin < columns.past(); begin += kChunk) {
    i64 cost[kItems];
    double mass[kItems];
    for (int i = 0; i < kItems; ++i) {
      const i64 at = begin + thread * kItems + i;
      const i64 slot = at < columns.past() ? slot_of[row * rows.stride + at] : -1;
      cost[i] = slot >= 0 ? columns.cost(slot) : 0;
      mass[i] = slot >= 0 ? rows.mass_of(row, columns, slot) : 0.;
    }
    i64 chunk_cost = 0;
    double chunk_mass = 0;
    CostScan(scan.cost).InclusiveSum(cost, cost, chunk_cost);
    __syncthreads();
    MassScan(scan.mass).InclusiveSum(mass, mass, chunk_mass);
    for (int i = 0; i < kItems; ++i) {
      cost_after[thread * kItems + i] = cost[i];
      mass_after[thread * kItems + i] = mass[i];
    }
    __syncthreads();
    for (i64 m = thread; m < methods; m += kThreads) {
      const i64 left = pairs[m * count + row] - cost_before;
      if (left < 0 || left >= chunk_cost) continue;
      int low = 0, high = kChunk - 1;  // the first column that is not paid for in full
      while (low < high) {
        const int middle = (low + high) / 2;
        if (cost_after[middle] > left)
          high = middle;
        else
          low = middle + 1;
      }
      const i64 paid = low > 0 ? cost_after[low - 1] : 0;
      const double held = low > 0 ? mass_after[low - 1] : 0.;
      const double part = static_cast<double>(left - paid) / static_cast<double>(cost_after[low] - paid);
      best[m * count + row] = mass_before + held + part * (mass_after[low] - held);
    }
    __syncthreads();
    cost_before += chunk_cost;
    mass_before += chunk_mass;
  }
  for (i64 m = thread; m < methods; m += kThreads)
    if (pairs[m * count + row] >= cost_before) best[m * count + row] = mass_before;
  if (thread == 0) total[row] = mass_before;
}

/// The methods that leave the same cells out, row by row.
struct Pass {
  std::vector<std::size_t> methods;
  std::vector<i32> sinks, window;  // empty: none
  Buffer<i32> device_sinks, device_window;
};

Buffer<i32> upload(const std::vector<i32>& host, Device& device) {
  Buffer<i32> out(borrowed(device), static_cast<i64>(host.size()));
  device.copy_in(out.data(), host.data(), host.size() * sizeof(i32));
  return out;
}

std::vector<Pass> passes_of(const std::vector<OracleRequest>& requests, Device& device) {
  std::vector<Pass> out(1);
  for (std::size_t m = 0; m < requests.size(); ++m) {
    out[0].methods.push_back(m);
    std::vector<i32> sinks = requests[m].exact_sinks, window = requests[m].exact_window;
    for (i32& n : sinks) n = std::max(n, 0);
    for (i32& n : window) n = std::max(n, 0);
    if (std::all_of(window.begin(), window.end(), [](i32 n) { return n == 0; })) continue;  // sinks alone are columns
    const auto same = [&](const Pass& p) { return p.window == window && p.sinks == sinks; };
    if (const auto known = std::find_if(out.begin() + 1, out.end(), same); known != out.end()) {
      known->methods.push_back(m);
      continue;
    }
    out.push_back({{m}, sinks, window, upload(sinks, device), upload(window, device)});
  }
  return out;
}

/// One call: its ranges, and the memory that they share.
class Oracle {
 public:
  Oracle(const Attention& a, i32 q_tile, const float* dense_lse, const std::vector<OracleRequest>& requests,
         Device& device)
      : a_(a),
        requests_(requests),
        device_(device),
        stream_(static_cast<cudaStream_t>(device.stream())),
        q_tile_(static_cast<i32>(std::min<i64>(q_tile, a.q.count))),
        tiles_(static_cast<i32>((a.q.count + q_tile_ - 1) / q_tile_)),
        heads_(static_cast<i64>(a.q.seqs) * a.layer.num_qo_heads),
        layer_(prepare_layer_mass(a, dense_lse, device, kOp)),
        passes_(passes_of(requests, device)),
        result_(requests.size(), std::vector<double>(static_cast<std::size_t>(heads_ * tiles_))) {}

  std::vector<std::vector<double>> run(std::size_t range_bytes) {
    std::vector<std::pair<i32, i32>> ranges;
    i64 rows = 0, elements = 0;
    for (i32 begin = 0, end = 0; begin < tiles_; begin = end) {
      for (end = begin + 1; end < tiles_ && bytes(end + 1 - begin, end + 1) <= range_bytes;) ++end;
      ranges.emplace_back(begin, end);
      rows = std::max(rows, heads_ * (end - begin));
      elements = std::max(elements, heads_ * (end - begin) * stride(end));
    }
    if (elements > cuda::kMostSorted)
      throw Error({"a tile of all heads is too large for one sort", std::to_string(cuda::kMostSorted) + " columns",
                   std::to_string(elements), kOp, "Use fewer sequences at once."});
    const auto methods = static_cast<i64>(requests_.size());
    const std::shared_ptr<Device> device = borrowed(device_);
    mass_ = Buffer<float>(device, elements);
    for (Buffer<u32>& keys : keys_) keys = Buffer<u32>(device, elements);
    for (Buffer<i32>& slots : slots_) slots = Buffer<i32>(device, elements);
    inside_ = Buffer<double>(device, passes_.size() > 1 ? rows * q_tile_ : 0);
    pairs_ = Buffer<i64>(device, methods * rows);
    best_ = Buffer<double>(device, methods * rows);
    total_ = Buffer<double>(device, rows);
    sort_ = Buffer<char>(device, cuda::kSortBytes);
    for (const auto& [begin, end] : ranges) run_range(begin, end);
    return std::move(result_);
  }

 private:
  /// Columns of the longest row of tiles before `end`.
  i64 stride(i32 end) const {
    return a_.kv.max_length - a_.q.count + std::min(static_cast<i64>(end) * q_tile_, a_.q.count);
  }
  std::size_t bytes(i32 tiles, i32 end) const {
    const i64 column = sizeof(float) + 2 * (sizeof(u32) + sizeof(i32));
    return static_cast<std::size_t>(heads_ * tiles * (stride(end) * column + q_tile_ * i64{sizeof(double)}));
  }

  void run_range(i32 begin, i32 end) {
    RangeRows rows{a_.kv.max_length, a_.q.count,   stride(end), q_tile_, begin,  end - begin,
                   tiles_,           mass_.data(), nullptr,     nullptr, nullptr};
    const sdk::Rows tiles{a_.q.seqs,  a_.layer.num_qo_heads, begin, end - begin, q_tile_, 1,
                          a_.q.count, a_.q.first_position};
    cuda::sum_units(layer_.mass, {tiles, mass_.data(), rows.stride, rows.stride, 1, 1.}, false, stream_, kOp);
    const i64 count = heads_ * rows.tiles;
    std::vector<double> all;  // mass of each row
    for (const Pass& pass : passes_) {
      const bool exact = !pass.window.empty();
      rows.sinks = pass.device_sinks.data();
      rows.window = pass.device_window.data();
      rows.inside = inside_.data();
      std::vector<i64> pairs;
      for (const std::size_t m : pass.methods)
        for (i64 row = 0; row < count; ++row) pairs.push_back(pairs_left(rows, pass, requests_[m], row));
      std::vector<double> best(pairs.size()), total(static_cast<std::size_t>(count));
      answer(rows, count, exact, static_cast<i64>(pass.methods.size()), pairs, best, total);
      for (std::size_t n = 0; n < pairs.size(); ++n) {
        const auto row = static_cast<i64>(n) % count;
        double& mass =
            result_[pass.methods[n / static_cast<std::size_t>(count)]][static_cast<std::size_t>(rows.row_of_call(row))];
        const auto at = static_cast<std::size_t>(row);
        if (!exact)
          mass = best[n];
        else if (pairs[n] != kUnasked)
          mass = std::max(mass, all[at] - total[at] + best[n]);
      }
      if (!exact) all = total;
    }
  }

  /// What a method has for columns after its exact cells.
  i64 pairs_left(const RangeRows& rows, const Pass& pass, const OracleRequest& request, i64 row) const {
    const auto at = static_cast<std::size_t>(rows.row_of_call(row));
    if (pass.window.empty()) return request.pairs[at];
    if (pass.window[at] == 0) return kUnasked;
    TileColumns columns = rows.visible(row);
    const i64 all = columns.total_cost();
    columns.sinks = pass.sinks[at];
    columns.window = pass.window[at];
    return std::max(request.pairs[at] - (all - columns.total_cost()), kUnasked);
  }

  void answer(const RangeRows& rows, i64 count, bool exact, i64 methods, const std::vector<i64>& pairs,
              std::vector<double>& best, std::vector<double>& total) {
    const i64 elements = count * rows.stride;
    device_.copy_in(pairs_.data(), pairs.data(), pairs.size() * sizeof(i64));
    if (exact) cuda::launch(kOp, stream_, inside_kernel, count, cuda::kThreads, 0, rows, layer_.mass, inside_.data());
    cuda::launch(kOp, stream_, density_kernel, cuda::ceil_div<i64>(elements, kThreads), kThreads, 0, rows, elements,
                 keys_[0].data(), slots_[0].data());
    cub::DoubleBuffer<u32> keys(keys_[0].data(), keys_[1].data());
    cub::DoubleBuffer<i32> slots(slots_[0].data(), slots_[1].data());
    cuda::sort_segments(kOp, keys, slots, elements, count, SegmentBegin{rows}, SegmentEnd{rows}, sort_.data(), stream_);
    cuda::launch(kOp, stream_, answer_kernel, count, kThreads, 0, rows, count, slots.Current(), methods, pairs_.data(),
                 best_.data(), total_.data());
    device_.copy_out(best.data(), best_.data(), best.size() * sizeof(double));
    device_.copy_out(total.data(), total_.data(), total.size() * sizeof(double));
  }

  const Attention& a_;
  const std::vector<OracleRequest>& requests_;
  Device& device_;
  cudaStream_t stream_;
  i32 q_tile_, tiles_;
  i64 heads_;
  LayerMass layer_;
  std::vector<Pass> passes_;
  std::vector<std::vector<double>> result_;
  Buffer<float> mass_;
  Buffer<u32> keys_[2];
  Buffer<i32> slots_[2];
  Buffer<double> inside_, best_, total_;
  Buffer<i64> pairs_;
  Buffer<char> sort_;
};

}  // namespace

std::vector<std::vector<double>> matched_oracle_cuda(const Attention& a, i32 q_tile, const float* dense_lse,
                                                     const std::vector<OracleRequest>& requests, Device& device,
                                                     std::size_t range_bytes) {
  if (requests.empty() || a.q.count == 0) return std::vector<std::vector<double>>(requests.size());
  return Oracle(a, q_tile, dense_lse, requests, device).run(range_bytes);
}

}  // namespace lacuna
