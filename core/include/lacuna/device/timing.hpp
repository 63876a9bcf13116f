// Times of work on a GPU: events around replays of a CUDA graph, medians and quartiles.
#pragma once

#include <functional>
#include <vector>

#include "lacuna/device/device.hpp"

namespace lacuna {

/// Linear interpolation between order statistics (type 7: the k-th of n values is the quantile (k - 1) / (n - 1)).
struct Quartiles {
  double q1, median, q3;
};
/// Throws Error when there is no value.
Quartiles quartiles(std::vector<double> values);

struct Timing {
  double median_us, q1_us, q3_us;  // of one variant's work on the GPU, by events
  int runs;
  bool graph;         // replayed as a CUDA graph; false: launched directly, the host's launches included
  int nodes;          // kernels, copies and fills of a variant; 0 where they were launched directly
  bool launch_bound;  // less than twice the time of as many empty kernels (direct: of one): its size tells little
};

struct TimingOptions {
  int warmup = 5;                                   // untimed replays, in turn as the timed ones
  int runs = 20;                                    // timed replays at least
  double least_seconds = 0.05, most_seconds = 2.0;  // more runs until the first; none after the second, but one
};

/// Times the work that each of `variants` enqueues on the device's stream. They do equal work on different copies of
/// the data and are used in turn: copies that are larger than the L2 cache together find it cold. With `flush`, a
/// buffer of twice the L2 cache is read before every replay, outside the timed span: for data that fit into it.
///
/// A variant is called once to warm up and once more to be captured into a CUDA graph that is then replayed, so it must
/// be repeatable. If any is not capturable (it waits, or allocates), all are called anew for every run instead. A
/// kernel that spins for some 20 us before the first event covers the host's part of a replay. Synchronises. Throws
/// Error on a CPU device, without variants, when a variant throws, and when one leaves nothing on the device's stream.
Timing time_work(Device& device, const std::vector<std::function<void()>>& variants, bool flush,
                 const TimingOptions& options = {});

}  // namespace lacuna
