#include "replay/timing_bench.hpp"

#include <algorithm>
#include <chrono>

#include "pipeline/row_math.hpp"
#include "pipeline/selections.hpp"
#include "replay/phase_run.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// Plans and indexes for an eviction after the prompt, and tells who asks for it of the dense pass over it.
void show_prefill(LayerPipeline& pipeline, TimedLayer& layer, i64 tokens) {
  const CallSpan span{Phase::prefill, -1, 0, tokens};
  pipeline.index(span, Phase::decode);
  if (!pipeline.evict() || !pipeline.evict()->wants_attended()) return;
  pipeline.attend_to(span, nullptr, {}, layer.out(), layer.lse());
  pipeline.attended(span, nullptr, layer.out(), layer.lse());
}

Cost difference(const Cost& after, const Cost& before) {
  return {after.bytes - before.bytes, after.flops - before.flops};
}

ChooseOptions quiet_options() {
  ChooseOptions options;
  options.check = options.account = false;
  options.range_elements = kRangeElements;
  return options;
}

}  // namespace

void add_reading(Reading& to, const Selection& selection, const Layer& layer, const std::vector<i32>& length,
                 std::vector<std::vector<char>>& seen) {
  const Rows& rows = selection.rows;
  const i32 group = layer.group();
  double pairs = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : pairs)
  for (i64 kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
    std::vector<char>& of_head = seen[static_cast<std::size_t>(kv_head)];
    const i64 readers = rows.per_query_head ? group : 1;  // rows of this KV head and tile
    for (i64 reader = 0; reader < readers; ++reader)
      for (i64 tile = 0; tile < rows.tiles; ++tile) {
        const i64 row = (kv_head * readers + reader) * rows.tiles + tile;
        const RowSlots at = row_slots(length.data(), rows, row, layer.num_kv_heads);
        const double heads = rows.per_query_head ? 1 : group;
        if (selection.full[row]) {
          pairs += heads * static_cast<double>(capped_pairs(at.end, at.begin, at.end));
          std::fill_n(of_head.begin(), at.end, char{1});
          continue;
        }
        const RowSet set = expand_row(selection, row, at.end);
        pairs += heads * static_cast<double>(set.pairs(at.begin, at.end));
        for (const i32 slot : set.cells(at.begin, at.end)) of_head[static_cast<std::size_t>(slot)] = 1;
      }
  }
  to.pairs += pairs;
  to.slots = 0;
  for (const auto& of_head : seen) to.slots += static_cast<double>(std::count(of_head.begin(), of_head.end(), 1));
}

SelectBench::SelectBench(TimedLayer& layer, const Cell& cell, ReplayPhase phase, int copies)
    : layer_(layer), setup_(layer.setup(cell.seed)), quiet_(quiet_options()) {
  const i64 tokens = layer.tokens();
  const bool decode = phase == ReplayPhase::decode;
  span_ = decode ? CallSpan{Phase::decode, 0, tokens - 1, tokens} : CallSpan{Phase::prefill, -1, 0, tokens};
  const Roles roles = roles_of(cell, phase);
  const bool evicts = decode && (cell.evict || (cell.allocate && !cell.select));
  for (int i = 0; i < copies; ++i) {
    auto pipeline = std::make_unique<LayerPipeline>(roles, setup_, layer.cache(decode ? tokens - 1 : tokens), quiet_);
    if (evicts) {
      show_prefill(*pipeline, layer, tokens - 1);
      pipeline->evict_at_cut();
    }
    if (decode) pipeline->append(tokens - 1, 1);
    pipeline->index(span_, span_.phase);
    pipelines_.push_back(std::move(pipeline));
  }
  std::vector<i32> sizes;
  for (const StrategyRuntime* r : {pipelines_.front()->select(), pipelines_.front()->evict()})
    if (r)
      for (const i32 g : r->granularities()) sizes.push_back(g);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  for (const i32 g : sizes) {
    std::vector<i32> begin, end;
    for (i32 h = 0; h < layer.layer().num_kv_heads; ++h) {
      begin.push_back(static_cast<i32>((pipelines_.front()->cache().length(h) - 1) / g));
      end.push_back(begin.back() + 1);
    }
    const auto n = static_cast<i64>(begin.size());
    Units units{g, Buffer<i32>(layer.device(), n), Buffer<i32>(layer.device(), n)};
    layer.device()->copy_in(units.begin.data(), begin.data(), begin.size() * sizeof(i32));
    layer.device()->copy_in(units.end.data(), end.data(), end.size() * sizeof(i32));
    newest_.push_back(std::move(units));
  }
  layer.device()->synchronize();
}

template <class F>
Meter::Variants SelectBench::for_each_copy(F f) {
  Meter::Variants out;
  for (auto& pipeline : pipelines_) out.push_back([f, p = pipeline.get()] { f(*p); });
  return out;
}

void SelectBench::attend(LayerPipeline& pipeline, const Selection& chosen) {
  pipeline.attend_to(span_, &chosen, {}, layer_.out(), layer_.lse());
}

Meter::Variants SelectBench::steps() {
  return for_each_copy([this](LayerPipeline& p) {
    p.choose_for(span_, quiet_, [&](const Selection& chosen) {
      attend(p, chosen);
      p.attended(span_, &chosen, layer_.out(), layer_.lse());
    });
  });
}

Meter::Variants SelectBench::choices() {
  return for_each_copy([this](LayerPipeline& p) { p.choose_for(span_, quiet_, [](const Selection&) {}); });
}

void SelectBench::gather(std::size_t copy, Meter::Variants& variants,
                         const std::function<void(const Meter::Variants&)>& use) {
  if (copy == pipelines_.size()) return use(variants);
  LayerPipeline& p = *pipelines_[copy];
  p.choose_for(span_, quiet_, [&](const Selection& chosen) {
    const Rows& rows = chosen.rows;
    if (rows.tiles < (rows.num_queries + rows.q_tile - 1) / rows.q_tile) return;  // one range of several
    variants.push_back([this, &p, chosen] { attend(p, chosen); });
    gather(copy + 1, variants, use);
  });
}

void SelectBench::with_attention(const std::function<void(const Meter::Variants&)>& use) {
  Meter::Variants variants;
  gather(0, variants, use);
}

Meter::Variants SelectBench::indexings() {
  if (newest_.empty()) return {};
  return for_each_copy([this](LayerPipeline& p) {
    for (const Units& u : newest_)
      p.index_units(span_, {layer_.layer().num_kv_heads, u.unit_tokens, u.begin.data(), u.end.data(), 1});
  });
}

SelectBench::Work SelectBench::work() {
  LayerPipeline& p = *pipelines_.front();
  std::vector<i32> length;
  std::vector<std::vector<char>> seen;
  for (i32 h = 0; h < layer_.layer().num_kv_heads; ++h) {
    length.push_back(static_cast<i32>(p.cache().length(h)));
    seen.emplace_back(static_cast<std::size_t>(length.back()));
  }
  Work out;
  const Cost before = p.selection_cost();
  p.choose_for(span_, quiet_, [&](const Selection& chosen) {
    attend(p, chosen);
    p.attended(span_, &chosen, layer_.out(), layer_.lse());
    const HostSelection host(*setup_.scratch, chosen);
    add_reading(out.reading, host.view(), layer_.layer(), length, seen);
  });
  out.charged = difference(p.selection_cost(), before);
  return out;
}

EvictTimes time_evictions(TimedLayer& layer, const Cell& cell, int runs) {
  using Clock = std::chrono::steady_clock;
  const LayerSetup setup = layer.setup(cell.seed);
  EvictTimes out{};
  std::vector<double> times;
  for (int i = 0; i <= runs; ++i) {
    LayerPipeline pipeline(roles_of(cell, ReplayPhase::evict), setup, layer.cache(layer.tokens()), quiet_options());
    show_prefill(pipeline, layer, layer.tokens());
    layer.device()->synchronize();
    const Cost before = pipeline.selection_cost();
    const Clock::time_point start = Clock::now();
    pipeline.evict_at_cut();
    layer.device()->synchronize();
    if (i > 0) times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    out.charged = difference(pipeline.selection_cost(), before);
  }
  const Quartiles q = quartiles(times);
  out.timing = {q.median, q.q1, q.q3, runs, false, 0, false};
  return out;
}

}  // namespace lacuna
