#include "replay/layer_run.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <list>
#include <memory>
#include <numeric>

#include "lacuna/base/error.hpp"
#include "lacuna/metrics/cuda_oracle.hpp"
#include "lacuna/metrics/matched_oracle.hpp"
#include "lacuna/pipeline/budget.hpp"
#include "lacuna/replay/layer_replay.hpp"
#include "replay/needs.hpp"
#include "replay/phase_run.hpp"

namespace lacuna {
using namespace sdk;

namespace {
/// The last queries of a phase that go through the fp64 oracle: 64, and fewer (8 at least) where the layer is long.
i64 noise_queries(const Layer& layer, i64 tokens) {
  constexpr i64 kMost = 64, kLeast = 8, kElements = i64{1} << 31;
  return std::clamp(kElements / (tokens * layer.num_qo_heads * layer.head_dim), kLeast, kMost);
}

/// Dense attention of a phase's queries, what methods are compared with, and the queries' blocks.
struct Reference {
  ReplayPhase phase;
  i64 begin, end;
  std::vector<float> out, lse;
  std::vector<double> projected;  // norms of W_O o, or empty

  i64 queries() const { return end - begin; }
};

Reference make_reference(const LayerReplay& layer, ReplayPhase phase, i64 begin, i64 end) {
  Reference r{phase, begin, end, layer.dense_out(begin, end), layer.dense_lse(begin, end), {}};
  if (layer.tensors().wo.present()) {
    r.projected.resize(static_cast<std::size_t>(end - begin));
    projected_norms(layer.tensors().wo, layer.layer().num_qo_heads, end - begin, layer.layer().head_dim, r.out.data(),
                    nullptr, r.projected.data());
  }
  return r;
}

BlockLayout layout_of(const TraceInfo& info, const Reference& ref, i64 min_context, i64& left_out) {
  std::vector<i64> borders;
  for (const Segment& s : info.segments) borders.insert(borders.end(), {s.begin - ref.begin, s.end - ref.begin});
  QuerySpan answer{};
  if (const auto s = info.segment("answer")) answer = {s->begin - ref.begin, s->end - ref.begin};
  std::vector<u8> mask;
  left_out = 0;
  if (ref.phase == ReplayPhase::prefill) {
    mask.resize(static_cast<std::size_t>(ref.queries()));
    for (i64 i = 0; i < ref.queries(); ++i) mask[static_cast<std::size_t>(i)] = ref.begin + i + 1 >= min_context;
    left_out = static_cast<i64>(std::count(mask.begin(), mask.end(), u8{0}));
  }
  return make_blocks(ref.queries(), ref.phase == ReplayPhase::prefill ? kPrefillBlock : kLaterBlock, borders, answer,
                     std::move(mask));
}

/// A finished row that still waits for its regret.
struct Pending {
  std::size_t row;
  BlockLayout layout;
  std::vector<double> mass;
  OracleRequest request;
  i32 q_tile;
  std::vector<i64> kept;  // one cut, KV heads: the eviction oracle applies
};

/// Everything that is replayed on one layer.
class LayerRun {
 public:
  LayerRun(const Trace& trace, int layer, const std::vector<Cell>& cells, const ReplayOptions& options,
           AcrossLayers& across, ReplayResult& result)
      : trace_(trace),
        info_(trace.info()),
        cells_(cells),
        options_(options),
        across_(across),
        result_(result),
        layer_(trace, layer, options.page_size, options.check, options.device) {}

  void run() {
    if (options_.phases.count(ReplayPhase::prefill)) phase(ReplayPhase::prefill, "");
    if (options_.phases.count(ReplayPhase::evict))
      for (const std::string& cut : cuts()) phase(ReplayPhase::evict, cut);
    if (options_.phases.count(ReplayPhase::decode) && info_.decode_tokens > 0) phase(ReplayPhase::decode, "");
  }

 private:
  std::vector<std::string> cuts() const {
    std::vector<std::string> out;
    for (std::size_t i = 0; i < cells_.size(); ++i)
      if (across_.acts(static_cast<int>(i), ReplayPhase::evict)) {
        const std::string cut = cut_parameter(cells_[i]);
        if (std::find(out.begin(), out.end(), cut) == out.end()) out.push_back(cut);
      }
    return out;
  }

  /// Where cells are replayed, the dense attention of the same backend, and the rows there that wait for their regret.
  struct Place {
    LayerReplay& layer;
    Reference ref;
    std::vector<Pending> pending;
  };

  /// The run's device, or the CPU for a cell with a strategy that has no code for it.
  LayerReplay& layer_of(const Cell& cell) {
    if (!layer_.on_device() || runs_on_device(cell)) return layer_;
    if (!host_layer_)
      host_layer_ = std::make_unique<LayerReplay>(trace_, layer_.layer().index, options_.page_size, options_.check);
    return *host_layer_;
  }

  void phase(ReplayPhase phase, const std::string& cut) {
    const PhaseQueries q = phase_queries(info_, phase, cut);
    if (q.begin >= q.end) return;
    std::list<Place> places;
    const auto place_of = [&](LayerReplay& layer) -> Place& {
      for (Place& p : places)
        if (&p.layer == &layer) return p;
      return places.emplace_back(Place{layer, make_reference(layer, phase, q.begin, q.end), {}});
    };
    if (across_.noise) noise(place_of(layer_).ref);
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      if (options_.stop && options_.stop()) break;
      const Cell& cell = cells_[i];
      if (!across_.acts(static_cast<int>(i), phase) || (phase == ReplayPhase::evict && cut_parameter(cell) != cut))
        continue;
      Row row = start_row(phase, static_cast<int>(i));
      row.nominal = cell.density(phase);
      try {
        cell_row(place_of(layer_of(cell)), cell, row);
      } catch (const std::exception& e) {
        row.status = "failed";
        row.error = e.what();
        row.metrics.clear();
        result_.rows.push_back(std::move(row));
      }
    }
    for (Place& place : places) regrets(place);
    if (options_.on_row)
      for (std::size_t r = reported_; r < result_.rows.size(); ++r) options_.on_row(result_.rows[r]);
    reported_ = result_.rows.size();
  }

  Row start_row(ReplayPhase phase, int cell) const {
    Row row;
    row.cell = cell;
    row.trace = std::filesystem::path(info_.path).filename().string();
    row.trace_id = trace_.content_id();
    row.model = info_.model;
    row.layer = layer_.layer().index;
    row.phase = phase;
    return row;
  }

  /// Dense attention rounded to bf16 against the fp64 oracle: differences below this row mean nothing.
  void noise(const Reference& ref) {
    if (layer_.layer().sliding_window > 0) return;
    const i64 n = std::min(noise_queries(layer_.layer(), ref.end), ref.queries()), begin = ref.end - n;
    const i32 heads = layer_.layer().num_qo_heads, d = layer_.layer().head_dim;
    const std::vector<float> out = layer_.dense_out(begin, ref.end), lse = layer_.dense_lse(begin, ref.end);
    std::vector<double> exact_out(out.size()), exact_lse(lse.size());
    attend_fp64(layer_.host_attention(begin, ref.end), exact_out.data(), exact_lse.data(), nullptr);
    const std::vector<float> truth_out(exact_out.begin(), exact_out.end()),
        truth_lse(exact_lse.begin(), exact_lse.end());
    std::vector<float> rounded(out.size());
    std::transform(out.begin(), out.end(), rounded.begin(), [](float x) { return from_bf16(to_bf16(x)); });
    const std::vector<double> all(lse.size(), 1.0), none(lse.size(), 0.0);
    Comparison c;
    c.heads = heads;
    c.head_dim = d;
    c.queries = n;
    c.dense_out = truth_out.data();
    c.dense_lse = truth_lse.data();
    c.sparse_out = rounded.data();
    c.sparse_lse = lse.data();
    c.mass_kept = all.data();
    c.wo = layer_.tensors().wo;
    c.regret = none.data();
    Row row = start_row(ref.phase, -1);
    row.queries = n;
    row.cut = ref.phase == ReplayPhase::evict ? ref.begin : -1;
    collect_all(row, c, make_blocks(n, ref.phase == ReplayPhase::prefill ? kPrefillBlock : kLaterBlock, {}));
    result_.rows.push_back(std::move(row));
  }

  static void collect_all(Row& row, const Comparison& c, const BlockLayout& layout) {
    for (const Metric& m : metrics()) {
      const Samples s = evaluate(m, c);
      if (s.rows > 0) row.metrics[m.name] = collect(m, s, layout);
    }
  }

  void cell_row(Place& place, const Cell& cell, Row& row) {
    const Reference& ref = place.ref;
    LayerReplay& layer = place.layer;
    const auto start = std::chrono::steady_clock::now();
    PhaseRun run = run_phase(
        layer, info_, cell, ref.phase, {ref.begin, ref.end},
        {options_.check, false, false, {}, {}, &across_.carried.at({row.cell, ref.phase}), across_.entropy_data()});
    row.cost = run.cost;
    row.cost.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    row.marks = run.marks;
    if (leaks(cell, trace_)) row.marks.push_back("leak");
    if (&layer != &layer_) row.marks.push_back("on-cpu");
    std::sort(row.marks.begin(), row.marks.end());
    row.realised_head = run.realised_head;
    row.realised_union = run.realised_union;
    row.target_share = run.target_share;
    row.read_share = run.read_share;
    row.sparse_rows = run.work.sparse_rows;
    row.queries = ref.queries();
    if (ref.phase == ReplayPhase::evict) row.cut = ref.begin;

    const std::optional<double> density = cell.density(ref.phase);
    row.min_context = ref.phase == ReplayPhase::prefill
                          ? options_.min_context.value_or(
                                default_min_context(density.value_or(options_.default_density), info_.prefill_tokens))
                          : 0;
    i64 left_out = 0;
    Pending p;
    p.layout = layout_of(info_, ref, row.min_context, left_out);
    row.left_out = left_out;

    p.mass = mass_of(layer, {ref.begin, ref.end}, run);
    if (layer_.layer().sliding_window == 0) {
      p.request = oracle_request(layer.host_attention(ref.begin, ref.end), run.sets, run.q_tile);
      p.q_tile = run.q_tile;
      p.kept = run.kept;
    }
    Comparison c;
    c.heads = layer_.layer().num_qo_heads;
    c.head_dim = layer_.layer().head_dim;
    c.queries = ref.queries();
    c.dense_out = ref.out.data();
    c.dense_lse = ref.lse.data();
    c.sparse_out = run.out.data();
    c.sparse_lse = run.lse.data();
    c.mass_kept = p.mass.data();
    c.unweighted_out = run.unweighted_out.empty() ? nullptr : run.unweighted_out.data();
    c.wo = layer_.tensors().wo;
    c.dense_projected = ref.projected.empty() ? nullptr : ref.projected.data();
    collect_all(row, c, p.layout);
    p.row = result_.rows.size();
    result_.rows.push_back(std::move(row));
    if (layer_.layer().sliding_window == 0) place.pending.push_back(std::move(p));
  }

  /// The matched oracle answers all methods of a tile size in one pass over the layer.
  void regrets(Place& place) {
    const Reference& ref = place.ref;
    std::vector<Pending>& pending = place.pending;
    if (pending.empty()) return;
    const i32 heads = layer_.layer().num_qo_heads;
    std::map<i32, std::vector<Pending*>> by_tile;
    std::vector<Pending*> evicted;
    for (Pending& p : pending) (p.kept.empty() ? by_tile[p.q_tile] : evicted).push_back(&p);
    std::vector<double> regret(static_cast<std::size_t>(heads * ref.queries()));
    for (auto& [q_tile, group] : by_tile) {
      std::vector<OracleRequest> requests;
      for (Pending* p : group) requests.push_back(std::move(p->request));
      guarded(group, [&, q_tile = q_tile, &group = group] {
        const auto oracle = oracle_of(place, q_tile, requests);
        for (std::size_t i = 0; i < group.size(); ++i) {
          regret_of_rows(oracle[i], group[i]->mass.data(), heads, ref.queries(), q_tile, regret.data());
          add_regret(*group[i], ref, regret.data());
        }
      });
    }
    if (evicted.empty()) return;
    std::vector<std::vector<i64>> kept;
    for (Pending* p : evicted) kept.push_back(p->kept);
    guarded(evicted, [&] {
      const auto oracle = evict_oracle_of(place, kept);
      for (std::size_t i = 0; i < evicted.size(); ++i) {
        for (std::size_t j = 0; j < regret.size(); ++j) regret[j] = oracle[i][j] - evicted[i]->mass[j];
        add_regret(*evicted[i], ref, regret.data());
      }
    });
  }

  /// Rows whose oracle fails (for want of memory) keep everything else and are marked.
  template <class F>
  void guarded(const std::vector<Pending*>& group, F f) {
    try {
      f();
    } catch (const std::exception&) {
      for (const Pending* p : group) {
        std::vector<std::string>& marks = result_.rows[p->row].marks;
        marks.insert(std::upper_bound(marks.begin(), marks.end(), "no-regret"), "no-regret");
      }
    }
  }

  static std::vector<std::vector<double>> oracle_of(Place& place, i32 q_tile,
                                                    const std::vector<OracleRequest>& requests) {
    const std::vector<float>& lse = place.ref.lse;
    const Attention dense = place.layer.dense_attention(place.ref.begin, place.ref.end);
    if (!place.layer.on_device()) return matched_oracle(dense, q_tile, lse.data(), requests);
    Scratch& scratch = place.layer.scratch();
    const Scratch::Frame frame(scratch);
    return matched_oracle_cuda(dense, q_tile, scratch.take_copy(lse.data(), static_cast<i64>(lse.size())), requests,
                               scratch.device());
  }
  static std::vector<std::vector<double>> evict_oracle_of(Place& place, const std::vector<std::vector<i64>>& kept) {
    const std::vector<float>& lse = place.ref.lse;
    const Attention dense = place.layer.dense_attention(place.ref.begin, place.ref.end);
    if (!place.layer.on_device()) return matched_evict_oracle(dense, place.ref.begin, lse.data(), kept);
    Scratch& scratch = place.layer.scratch();
    const Scratch::Frame frame(scratch);
    return matched_evict_oracle_cuda(
        dense, place.ref.begin, scratch.take_copy(lse.data(), static_cast<i64>(lse.size())), kept, scratch.device());
  }

  void add_regret(const Pending& p, const Reference& ref, const double* regret) {
    Comparison c;
    c.heads = layer_.layer().num_qo_heads;
    c.head_dim = layer_.layer().head_dim;
    c.queries = ref.queries();
    c.regret = regret;
    const Metric& m = find_metric("regret");
    result_.rows[p.row].metrics[m.name] = collect(m, evaluate(m, c), p.layout);
  }

  const Trace& trace_;
  const TraceInfo& info_;
  const std::vector<Cell>& cells_;
  const ReplayOptions& options_;
  AcrossLayers& across_;
  ReplayResult& result_;
  LayerReplay layer_;
  std::unique_ptr<LayerReplay> host_layer_;  // see layer_of()
  std::size_t reported_ = result_.rows.size();
};

}  // namespace

void run_layer(const Trace& trace, int layer, const std::vector<Cell>& cells, const ReplayOptions& options,
               AcrossLayers& across, ReplayResult& result) {
  LayerRun(trace, layer, cells, options, across, result).run();
}

}  // namespace lacuna
