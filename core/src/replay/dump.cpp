#include "lacuna/replay/dump.hpp"

#include <algorithm>
#include <boost/dll/runtime_symbol_info.hpp>
#include <limits>
#include <map>

#include "lacuna/base/error.hpp"
#include "lacuna/replay/replay.hpp"
#include "lacuna/strategy/library_id.hpp"
#include "lacuna/trace/safetensors.hpp"
#include "replay/needs.hpp"
#include "replay/phase_run.hpp"

namespace lacuna {
using namespace sdk;

namespace {

/// Rows of indices, one after the other: `indptr` [rows + 1], `indices`, and log weights where there are any.
struct Ragged {
  std::vector<i64> indptr = {0};
  std::vector<i32> indices;
  std::vector<float> log_weight;

  void add(i32 index) { indices.push_back(index); }
  void end_row() { indptr.push_back(static_cast<i64>(indices.size())); }
  void add_row(const std::vector<i32>& row) {
    indices.insert(indices.end(), row.begin(), row.end());
    end_row();
  }
};

/// The file as it grows. Keeps pointers: what is given to it must live until write().
class DumpFile {
 public:
  void add(const std::string& name, const std::vector<float>& v, std::vector<i64> shape) {
    tensors_[name] = {StoredType::f32, std::move(shape), v.data()};
  }
  void add(const std::string& name, const std::vector<i32>& v) {
    tensors_[name] = {StoredType::i32, {static_cast<i64>(v.size())}, v.data()};
  }
  void add(const std::string& name, const Ragged& r, const char* indices, bool weighted) {
    tensors_[name + ".indptr"] = {StoredType::i64, {static_cast<i64>(r.indptr.size())}, r.indptr.data()};
    add(name + "." + indices, r.indices);
    if (weighted) add(name + ".log_weight", r.log_weight, {static_cast<i64>(r.log_weight.size())});
  }
  void note(const std::string& key, std::string value) { metadata_[key] = std::move(value); }
  void note(const std::string& key, i64 value) { metadata_[key] = std::to_string(value); }
  void write(const std::string& path) const { write_safetensors(path, tensors_, metadata_); }

 private:
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Prefill rows: head * tiles + tile.
class PrefillRows {
 public:
  void take(const Step& step, const Layer& layer, i64 queries) {
    const Choice& choice = step.choice;
    kv_block_ = choice.kv_block > 1 ? choice.kv_block : 0;
    weighted_ = choice.weighted;
    const i32 tiles = choice.tiles();
    for (i32 head = 0; head < layer.num_qo_heads; ++head)
      for (i32 tile = 0; tile < tiles; ++tile) {
        const i64 row = static_cast<i64>(choice.rows.per_query_head ? head : head / layer.group()) * tiles + tile;
        const i64 begin = static_cast<i64>(tile) * choice.q_tile(), end = std::min(begin + choice.q_tile(), queries);
        take_row(choice.lists[static_cast<std::size_t>(row)],
                 choice.sets[static_cast<std::size_t>(head * tiles + tile)], begin, end);
      }
  }

  void store(DumpFile& file, bool with_cells) const {
    file.add("pieces", pieces_, "starts", weighted_);
    file.add("columns", columns_, "indices", weighted_);
    if (with_cells) file.add("cells", cells_, "indices", false);
    file.note("kv_block", kv_block_);
    const auto spread = [&](const char* name, const std::vector<i32>& of_row) {
      const auto [least, most] = std::minmax_element(of_row.begin(), of_row.end());
      file.note(name, *most);
      if (*least != *most) file.add(name, of_row);
    };
    spread("exact_sinks", sinks_);
    spread("exact_window", window_);
  }

 private:
  void take_row(const RowLists& lists, const RowSet& set, i64 begin, i64 end) {
    std::vector<i32> starts;
    if (lists.full && kv_block_ > 0) {
      for (i64 at = 0; at < end; at += kv_block_) starts.push_back(static_cast<i32>(at));
    } else if (!lists.full) {
      starts = lists.pieces;
      std::sort(starts.begin(), starts.end());
    }
    std::size_t piece = 0;
    i64 covered = 0;  // slots below it and at or after the last piece begun belong to that piece
    for (const i32 start : starts) {
      pieces_.add(start);
      if (weighted_) pieces_.log_weight.push_back(set.weight(start));
    }
    for (const i32 slot : set.slots) {
      for (; piece < starts.size() && starts[piece] <= slot; ++piece)
        covered = starts[piece] + static_cast<i64>(kv_block_);
      if (slot < covered) continue;
      columns_.add(slot);
      if (weighted_) columns_.log_weight.push_back(set.weight(slot));
    }
    pieces_.end_row();
    columns_.end_row();
    cells_.add_row(set.cells(begin, end));
    sinks_.push_back(lists.sinks);
    window_.push_back(lists.window);
  }

  Ragged pieces_, columns_, cells_;
  std::vector<i32> sinks_, window_;
  i32 kv_block_ = 0;
  bool weighted_ = false;
};

/// Decode rows: step * heads + head, every token that is read, by original position.
class DecodeRows {
 public:
  explicit DecodeRows(i64 first_position) : position_(first_position) {}

  void take(const Step& step) {
    weighted_ |= step.choice.weighted;
    for (const RowSet& set : step.position_sets) {
      tokens_.add_row(set.cells(position_, position_ + 1));
      for (auto i = static_cast<std::size_t>(*(tokens_.indptr.end() - 2)); i < tokens_.indices.size(); ++i)
        tokens_.log_weight.push_back(set.weight(tokens_.indices[i]));
    }
    ++position_;
  }

  void store(DumpFile& file, bool with_cells) const {
    file.add("tokens", tokens_, "indices", weighted_);
    if (with_cells) file.add("cells", tokens_, "indices", false);
  }

 private:
  i64 position_;
  Ragged tokens_;
  bool weighted_ = false;
};

/// Scores of every call, one row each, padded with -inf to the longest.
class ScoreRows {
 public:
  void take(const std::vector<float>& scores, i64 stride) {
    if (scores.empty()) return;
    calls_.push_back({scores, stride});
    stride_ = std::max(stride_, stride);
  }

  void store(DumpFile& file) {
    for (const auto& [scores, stride] : calls_)
      for (i64 at = 0; at < static_cast<i64>(scores.size()); at += stride) {
        values_.insert(values_.end(), scores.begin() + at, scores.begin() + at + stride);
        values_.resize(values_.size() + static_cast<std::size_t>(stride_ - stride),
                       -std::numeric_limits<float>::infinity());
      }
    if (stride_ > 0) file.add("scores", values_, {static_cast<i64>(values_.size()) / stride_, stride_});
  }

 private:
  std::vector<std::pair<std::vector<float>, i64>> calls_;
  std::vector<float> values_;
  i64 stride_ = 0;
};

Json strategy_ids(const Cell& cell) {
  Json out = Json::object();
  const auto add = [&](const std::string& role, const std::optional<Resolved>& resolved) {
    std::string path = role;
    for (const Resolved* r = resolved ? &*resolved : nullptr; r; r = r->base.get(), path += ".base")
      out[path] = r->type->name() + "@" + r->type->id();
  };
  add("select", cell.select);
  add("evict", cell.evict);
  add("allocate", cell.allocate);
  return out;
}

}  // namespace

void dump(const Trace& trace, const Cell& cell, const DumpOptions& options, const std::string& path) {
  const TraceInfo& info = trace.info();
  std::string reason = why_skipped(cell, options.phase, info);
  const PhaseQueries q = phase_queries(info, options.phase, cut_parameter(cell));
  if (reason.empty()) reason = missing_need(cell, trace, options.allow_leak);
  if (reason.empty() && q.begin == q.end) reason = "the trace has no queries there";
  if (!reason.empty())
    throw lacuna::Error(Problem{std::string("nothing to dump in ") + name_of(options.phase),
                                "a strategy that acts in this phase", reason, info.path,
                                "choose another phase, or give the role that acts in it"});

  LayerReplay layer(trace, options.layer, options.page_size, options.check, options.device);
  const Layer& l = layer.layer();
  PrefillRows prefill;
  DecodeRows decode(q.begin);
  Ragged kept;
  ScoreRows scores;
  CarriedArrays carried;
  const std::vector<double> entropy = layer_entropy(trace, {cell});
  const double* const entropies = entropy.empty() ? nullptr : entropy.data();
  if (asks_for(cell, kNeedsAllLayers))
    for (const int before : info.captured_layers) {
      if (before >= options.layer) break;
      LayerReplay earlier(trace, before, options.page_size, options.check, options.device);
      run_phase(earlier, info, cell, options.phase, q, {options.check, false, false, {}, {}, &carried, entropies});
    }
  PhaseOptions run_options{options.check, options.phase == ReplayPhase::prefill, options.scores, {}, {}, &carried,
                           entropies};
  if (options.phase != ReplayPhase::evict)
    run_options.on_step = [&](const Step& step) {
      if (options.phase == ReplayPhase::prefill)
        prefill.take(step, l, q.end);
      else
        decode.take(step);
      scores.take(step.choice.scores, step.choice.scores_stride);
    };
  else
    run_options.on_eviction = [&](const Eviction& e) {
      std::vector<i32> all(static_cast<std::size_t>(q.begin));
      for (i64 i = 0; i < q.begin; ++i) all[static_cast<std::size_t>(i)] = static_cast<i32>(i);
      // Nothing was evicted before, so that slots are positions; a layer that is left alone keeps them all.
      for (std::size_t h = 0; h < static_cast<std::size_t>(l.num_kv_heads); ++h)
        kept.add_row(e.kept.empty() ? all : e.kept[h]);
      scores.take(e.scores, q.begin);
    };
  const PhaseRun run = run_phase(layer, info, cell, options.phase, q, run_options);

  DumpFile file;
  const i64 queries = q.end - q.begin;
  const std::vector<double> exact = mass_of(layer, q, run);
  const std::vector<float> mass(exact.begin(), exact.end());
  file.add("out", run.out, {l.num_qo_heads, queries, l.head_dim});
  file.add("lse", run.lse, {l.num_qo_heads, queries});
  file.add("mass_kept", mass, {l.num_qo_heads, queries});
  for (const char* unused : {"kv_block", "exact_sinks", "exact_window"}) file.note(unused, 0);
  file.note("q_tile", options.phase == ReplayPhase::prefill ? run.q_tile : 1);
  switch (options.phase) {
    case ReplayPhase::prefill: prefill.store(file, options.cells); break;
    case ReplayPhase::decode: decode.store(file, options.cells); break;
    case ReplayPhase::evict:
      file.add("kept", kept, "indices", false);
      if (options.cells) file.add("cells", kept, "indices", false);
      file.note("cut", q.begin);
      break;
  }
  scores.store(file);
  file.note("format", "lacuna-dump");
  file.note("version", 1);
  file.note("phase", name_of(options.phase));
  file.note("layer", l.index);
  file.note("num_qo_heads", l.num_qo_heads);
  file.note("num_kv_heads", l.num_kv_heads);
  file.note("head_dim", l.head_dim);
  file.note("first_query", q.begin);
  file.note("queries", queries);
  file.note("parameters", cell.describe().dump());
  file.note("marks", Json(run.marks).dump());
  file.note("trace_id", trace.content_id());
  file.note("strategy_ids", strategy_ids(cell).dump());
  file.note("engine_id", library_id(boost::dll::this_line_location().string()));
  file.write(path);
}

}  // namespace lacuna
