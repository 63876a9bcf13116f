// Sorts (key, index) pairs of many rows, a block a row. Stable, and in the caller's memory.
#pragma once

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_segmented_radix_sort.cuh>
#include <limits>

#include "launch.cuh"

namespace lacuna::cuda {

/// What the sort takes beside the two pairs of buffers, which it is given; it asks for next to nothing.
constexpr std::size_t kSortBytes = 4 << 10;
constexpr i64 kMostSorted = std::numeric_limits<i32>::max();  // elements of all rows

/// Ascending by key within elements [begin(row), end(row)) of each row, ties in the order they came in; what lies
/// outside is undefined afterwards. begin and end: device functions i32(i32). `own`: kSortBytes of device memory.
template <class Begin, class End>
void sort_segments(const char* op, cub::DoubleBuffer<u32>& keys, cub::DoubleBuffer<i32>& indices, i64 elements,
                   i64 rows, Begin begin, End end, void* own, cudaStream_t stream) {
  const thrust::counting_iterator<i32> row(0);
  const auto sort = [&](void* temporary, std::size_t& bytes) {
    check(cub::DeviceSegmentedRadixSort::SortPairs(temporary, bytes, keys, indices, static_cast<int>(elements),
                                                   static_cast<int>(rows), thrust::make_transform_iterator(row, begin),
                                                   thrust::make_transform_iterator(row, end), 0, 32, stream),
          op);
  };
  std::size_t wanted = 0;
  sort(nullptr, wanted);
  if (wanted > kSortBytes)
    throw Error({"the sort wants more than its share of the workspace", std::to_string(wanted) + " bytes",
                 std::to_string(kSortBytes) + " bytes", op, ""});
  sort(own, wanted);
}

}  // namespace lacuna::cuda
