// One method at work on the layer that is timed: what is called again and again, and what it reads.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "replay/timing_layer.hpp"

namespace lacuna {

/// How times are taken: on a GPU time_work, in tests something that can run without one.
struct Meter {
  using Variants = std::vector<std::function<void()>>;
  DevicePeaks peaks{};
  std::function<Timing(const Variants&, const TimingOptions&)> time;
  std::function<std::optional<Clocks>()> clocks;
  std::function<std::size_t()> free_bytes;  // of the device, now
};

/// What attention reads of one selection, counted from its lists.
struct Reading {
  double pairs = 0;  // (query, key), of all query heads
  double slots = 0;  // distinct (KV head, slot) that any query reads
};

/// Pipelines of one cell on copies of one cache, each ready for the same call: a decode step of the last token, or
/// the whole prefill.
class SelectBench {
 public:
  /// Evicts before a decode step where the cell does. Throws Error.
  SelectBench(TimedLayer& layer, const Cell& cell, ReplayPhase phase, int copies);
  SelectBench(const SelectBench&) = delete;

  Meter::Variants steps();    // choose, attend, and tell who asks what was read
  Meter::Variants choices();  // the choice alone
  /// Attention alone: calls `use` while the selections of all copies exist. A prefill whose choice comes in more than
  /// one range is not offered.
  void with_attention(const std::function<void(const Meter::Variants&)>& use);
  /// Indexing of the units that hold the newest token; empty without side data.
  Meter::Variants indexings();

  /// Work of one step: charged by the strategies, read by attention.
  struct Work {
    Reading reading;
    Cost charged;
  };
  Work work();

  bool selects() const { return pipelines_.front()->select() != nullptr; }
  bool evicts_while_decoding() const {
    return span_.phase == sdk::Phase::decode && pipelines_.front()->evicts_while_decoding();
  }
  LayerPipeline& pipeline(int copy) { return *pipelines_[static_cast<std::size_t>(copy)]; }
  const CallSpan& span() const { return span_; }

 private:
  struct Units {  // of one granularity; the arrays are the device's
    sdk::i32 unit_tokens;
    Buffer<sdk::i32> begin, end;
  };
  template <class F>
  Meter::Variants for_each_copy(F f);
  void attend(LayerPipeline& pipeline, const sdk::Selection& chosen);
  void gather(std::size_t copy, Meter::Variants& variants, const std::function<void(const Meter::Variants&)>& use);

  TimedLayer& layer_;
  LayerSetup setup_;
  CallSpan span_;
  ChooseOptions quiet_;
  std::vector<std::unique_ptr<LayerPipeline>> pipelines_;
  std::vector<Units> newest_;
};

/// Evicts the whole prompt `runs` times, each time from a cache made anew. Wall time from the call to the end of its
/// work on the device, after one run that is not counted.
struct EvictTimes {
  Timing timing;
  Cost charged;
};
EvictTimes time_evictions(TimedLayer& layer, const Cell& cell, int runs);

/// Adds what a range of a selection (host memory) reads. length: [num_kv_heads] cached tokens; `seen`: [num_kv_heads]
/// [length], slots read so far.
void add_reading(Reading& to, const sdk::Selection& selection, const sdk::Layer& layer,
                 const std::vector<sdk::i32>& length, std::vector<std::vector<char>>& seen);

/// The whole pass with any way to take times; time_cells measures with the GPU's.
CostResult time_cells_with(const Trace& trace, const std::vector<Cell>& cells, const CostOptions& options,
                           const CostRun& run, const Meter& meter);

}  // namespace lacuna
