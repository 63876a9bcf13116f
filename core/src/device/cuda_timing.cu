// A replay is: [read of twice the L2 cache] spin, event, graph, event. The spin lets the host enqueue all of it before
// the GPU reaches the first event, so that the host's part is in no span. No fmt here (see cuda.cu).
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <type_traits>

#include "cuda_stream_read.cuh"
#include "lacuna/device/timing.hpp"

namespace lacuna {
namespace {

using Seconds = std::chrono::duration<double>;
using Clock = std::chrono::steady_clock;

constexpr long long kSpinCycles = 40000, kSpinCyclesPerNode = 400;  // 20 us at 2 GHz, and what a launch of nodes takes

template <auto Destroy>
struct Destroyer {
  template <class T>
  void operator()(T* handle) const {
    Destroy(handle);
  }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, Destroyer<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroyer<cudaGraphExecDestroy>>;
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroyer<cudaEventDestroy>>;
using Variants = std::vector<std::function<void()>>;

__global__ void spin_kernel(long long cycles) {
  for (const long long start = clock64(); clock64() - start < cycles;) {
  }
}
__global__ void empty_kernel() {}

Event make_event() {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreate(&event), "cudaEventCreate");
  return Event(event);
}

/// The work that `enqueue` puts on the stream; null where it cannot be captured.
Graph capture(cudaStream_t stream, const std::function<void()>& enqueue) {
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  bool refused = false;
  try {
    enqueue();
  } catch (...) {  // it ran before without capture: what it throws now is the refusal
    refused = true;
  }
  cudaGraph_t captured = nullptr;
  refused |= cudaStreamEndCapture(stream, &captured) != cudaSuccess;
  Graph graph(captured);
  if (!refused) return graph;
  cudaGetLastError();
  return nullptr;
}

std::vector<cudaGraphNode_t> nodes_of(cudaGraph_t graph) {
  std::size_t n = 0;
  check_cuda(cudaGraphGetNodes(graph, nullptr, &n), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(n);
  if (n > 0) check_cuda(cudaGraphGetNodes(graph, nodes.data(), &n), "cudaGraphGetNodes");
  return nodes;
}

/// Kernels, copies and fills, those of child graphs included.
int working_nodes(cudaGraph_t graph) {
  int count = 0;
  for (const cudaGraphNode_t node : nodes_of(graph)) {
    cudaGraphNodeType type;
    check_cuda(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      check_cuda(cudaGraphChildGraphNodeGetGraph(node, &child), "cudaGraphChildGraphNodeGetGraph");
      count += working_nodes(child);
    } else if (type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemcpy || type == cudaGraphNodeTypeMemset) {
      ++count;
    }
  }
  return count;
}

/// Everything of a variant, or of the empty kernels, that can be replayed.
struct Work {
  std::vector<GraphExec> graphs;  // one a variant, or none
  const Variants* variants;       // launched directly where there are no graphs
  int nodes = 0;                  // the most of any graph

  void enqueue(std::size_t turn, cudaStream_t stream) const {
    if (graphs.empty())
      (*variants)[turn % variants->size()]();
    else
      check_cuda(cudaGraphLaunch(graphs[turn % graphs.size()].get(), stream), "cudaGraphLaunch");
  }
};

Work prepare(cudaStream_t stream, const Variants& variants) {
  Work work{{}, &variants};
  for (const auto& variant : variants) {
    const Graph graph = capture(stream, variant);
    if (!graph) return Work{{}, &variants};
    const int nodes = working_nodes(graph.get());
    if (nodes == 0) {
      throw Error({"nothing to time", "work on the device's stream", "none", "time_work",
                   "Enqueue on Device::stream(), not on another stream."});
    }
    work.nodes = std::max(work.nodes, nodes);
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaGraphInstantiate(&exec, graph.get(), 0), "cudaGraphInstantiate");
    work.graphs.emplace_back(exec);
    check_cuda(cudaGraphUpload(exec, stream), "cudaGraphUpload");
  }
  return work;
}

/// What is read between replays, or nothing.
class Flush {
 public:
  Flush(Device& device, cudaStream_t stream, bool wanted) : device_(device), stream_(stream) {
    if (!wanted) return;
    int index = 0, l2_bytes = 0;
    check_cuda(cudaGetDevice(&index), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, index), "cudaDeviceGetAttribute");
    check_cuda(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    bytes_ = 2 * static_cast<std::size_t>(l2_bytes);
    data_ = device.allocate(bytes_ + sizeof(unsigned));
    device.fill(data_, 0, bytes_ + sizeof(unsigned));
  }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;
  ~Flush() {
    if (data_) device_.release(data_);
  }
  void enqueue() const {
    if (data_)
      stream_read(data_, bytes_, reinterpret_cast<unsigned*>(static_cast<char*>(data_) + bytes_), sms_, stream_);
  }

 private:
  Device& device_;
  cudaStream_t stream_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  int sms_ = 0;
};

std::vector<double> replay(cudaStream_t stream, const Work& work, const Flush& flush, const TimingOptions& options) {
  const Event begin = make_event(), end = make_event();
  const Clock::time_point start = Clock::now();
  const auto passed = [&] { return Seconds(Clock::now() - start).count(); };
  std::size_t turn = 0;
  const auto once = [&] {
    flush.enqueue();
    spin_kernel<<<1, 1, 0, stream>>>(kSpinCycles + kSpinCyclesPerNode * work.nodes);
    check_cuda(cudaGetLastError(), "the launch of the spin");
    check_cuda(cudaEventRecord(begin.get(), stream), "cudaEventRecord");
    work.enqueue(turn++, stream);
    check_cuda(cudaEventRecord(end.get(), stream), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "cudaEventElapsedTime");
    return 1e3 * static_cast<double>(milliseconds);
  };
  for (int i = 0; i < options.warmup && passed() < options.most_seconds; ++i) once();
  std::vector<double> times;
  do {
    times.push_back(once());
  } while (passed() < options.most_seconds &&
           (static_cast<int>(times.size()) < options.runs || passed() < options.least_seconds));
  return times;
}

/// Median of as many empty kernels, replayed in the same way.
double empty_us(Device& device, cudaStream_t stream, const Work& work) {
  const int kernels = std::max(work.nodes, 1);
  const Variants empties{[=] {
    for (int i = 0; i < kernels; ++i) empty_kernel<<<1, 1, 0, stream>>>();
    check_cuda(cudaGetLastError(), "the launch of empty kernels");
  }};
  const Work empty = work.graphs.empty() ? Work{{}, &empties} : prepare(stream, empties);
  return quartiles(replay(stream, empty, Flush(device, stream, false), {2, 9, 0., 1.})).median;
}

}  // namespace

Timing time_work(Device& device, const Variants& variants, bool flush, const TimingOptions& options) {
  if (!device.on_device())
    throw Error({"times by events need a GPU", "a CUDA device", device.describe(), "time_work", ""});
  if (variants.empty()) throw Error({"nothing to time", "at least one variant", "none", "time_work", ""});
  const auto stream = static_cast<cudaStream_t>(device.stream());
  device.synchronize();  // which also makes it the current device
  // The first call of a kernel may load its code, which must be neither captured nor timed.
  for (const auto& variant : variants) variant();
  device.synchronize();

  const Work work = prepare(stream, variants);
  const Flush between(device, stream, flush);
  const std::vector<double> times = replay(stream, work, between, options);
  const Quartiles q = quartiles(times);
  return {q.median,
          q.q1,
          q.q3,
          static_cast<int>(times.size()),
          !work.graphs.empty(),
          work.nodes,
          q.median < 2 * empty_us(device, stream, work)};
}

}  // namespace lacuna
