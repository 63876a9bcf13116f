// The file that `dump` writes against the rules of docs/dump.md: rows, lists, and attention over what they list.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "lacuna/attention/attention.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/replay/dump.hpp"
#include "lacuna/replay/layer_replay.hpp"
#include "lacuna/trace/safetensors.hpp"
#include "replay/support.hpp"
#include "scratch_directory.hpp"

using namespace lacuna;
using namespace lacuna::testing;
using sdk::i32;
using sdk::i64;

namespace {

constexpr i64 kPrompt = 330, kSteps = 7;
constexpr int kLayer = 2, kHeads = 6, kKvHeads = 2, kDim = 64;

const Trace& trace() {
  static const Trace t = [] {
    SyntheticSpec spec;
    spec.num_qo_heads = kHeads;
    spec.num_kv_heads = kKvHeads;
    spec.head_dim = kDim;
    spec.prefill_tokens = kPrompt;
    spec.decode_tokens = kSteps;
    spec.captured_layers = {kLayer};
    return synthetic_trace(spec);
  }();
  return t;
}

/// A written dump, read back.
class Dumped {
 public:
  Dumped(const Json& roles, ReplayPhase phase) {
    DumpOptions options;
    options.phase = phase;
    options.layer = kLayer;
    options.cells = options.scores = options.check = true;
    dump(trace(), cell_of(roles), options, directory_.file("dump.safetensors"));
    file_ = std::make_unique<SafetensorsFile>(directory_.file("dump.safetensors"));
  }

  bool has(const std::string& name) const { return file_->tensors().count(name) > 0; }
  const StoredTensor& tensor(const std::string& name) const {
    REQUIRE_MESSAGE(has(name), name);
    return file_->tensors().at(name);
  }
  std::string note(const std::string& key) const { return file_->metadata().at(key); }
  i64 number(const std::string& key) const { return std::stoll(note(key)); }
  const float* floats(const std::string& name) const {
    REQUIRE(tensor(name).type == StoredType::f32);
    return static_cast<const float*>(tensor(name).data);
  }
  i64 rows(const std::string& name) const { return tensor(name + ".indptr").elements() - 1; }
  std::vector<i32> row(const std::string& name, const char* indices, i64 r) const {
    REQUIRE(tensor(name + ".indptr").type == StoredType::i64);
    REQUIRE(tensor(name + "." + indices).type == StoredType::i32);
    const auto* indptr = static_cast<const i64*>(tensor(name + ".indptr").data);
    const auto* data = static_cast<const i32*>(tensor(name + "." + indices).data);
    const std::vector<i32> out(data + indptr[r], data + indptr[r + 1]);
    CHECK(std::adjacent_find(out.begin(), out.end(), std::greater_equal<>()) == out.end());  // ascending, unique
    return out;
  }

 private:
  ScratchDirectory directory_;
  std::unique_ptr<SafetensorsFile> file_;
};

/// lse and mass of one query over exactly these keys, in fp64.
struct Exact {
  double lse = 0, mass = 0;
  std::vector<double> out = std::vector<double>(kDim);
};

Exact attend_exactly(i64 head, i64 q, const std::vector<i64>& keys) {
  const LayerTensors t = trace().layer(kLayer);
  const i64 tokens = kPrompt + kSteps, kv = head / (kHeads / kKvHeads);
  const auto *qs = static_cast<const float*>(t.q.data), *ks = static_cast<const float*>(t.k.data),
             *vs = static_cast<const float*>(t.v.data);
  const auto weight = [&](i64 j) {
    double logit = 0;
    for (i64 c = 0; c < kDim; ++c)
      logit += static_cast<double>(qs[(head * tokens + q) * kDim + c]) * ks[(kv * tokens + j) * kDim + c];
    return std::exp(logit * trace().info().layer(kLayer).softmax_scale);
  };
  double sum = 0, all = 0;
  Exact e;
  for (i64 j = 0; j <= q; ++j) all += weight(j);
  for (const i64 j : keys) {
    const double w = weight(j);
    sum += w;
    for (i64 c = 0; c < kDim; ++c) e.out[static_cast<std::size_t>(c)] += w * vs[(kv * tokens + j) * kDim + c];
  }
  for (double& x : e.out) x /= sum;
  e.lse = std::log(sum);
  e.mass = sum / all;
  return e;
}

void check_query(const Dumped& d, i64 head, i64 q, const std::vector<i64>& keys) {
  const i64 queries = d.number("queries"), at = head * queries + q - d.number("first_query");
  const Exact e = attend_exactly(head, q, keys);
  CAPTURE(head);
  CAPTURE(q);
  CHECK(d.floats("lse")[at] == doctest::Approx(e.lse).epsilon(1e-5));
  CHECK(d.floats("mass_kept")[at] == doctest::Approx(e.mass).epsilon(1e-5));
  for (i64 c = 0; c < kDim; ++c)
    CHECK(std::abs(d.floats("out")[at * kDim + c] - e.out[static_cast<std::size_t>(c)]) < 1e-4);
}

/// Every row of a prefill dump: lists apart, cells their union, and attention over them.
void check_prefill(const Json& select) {
  const Dumped d({{"select", select}}, ReplayPhase::prefill);
  const i64 q_tile = d.number("q_tile"), block = d.number("kv_block"), tiles = (kPrompt + q_tile - 1) / q_tile;
  REQUIRE(d.rows("pieces") == kHeads * tiles);
  REQUIRE(d.rows("columns") == kHeads * tiles);
  REQUIRE(d.rows("cells") == kHeads * tiles);
  for (i64 row = 0; row < kHeads * tiles; ++row) {
    const i64 begin = row % tiles * q_tile, end = std::min(begin + q_tile, kPrompt);
    const auto of_row = [&](const char* name) {
      return d.has(name) ? static_cast<const i32*>(d.tensor(name).data)[row] : d.number(name);
    };
    const i64 sinks = of_row("exact_sinks"), window = of_row("exact_window");
    std::set<i64> listed, cells;
    for (const i32 start : d.row("pieces", "starts", row))
      for (i64 j = start; j < start + block; ++j) listed.insert(j);
    for (const i32 j : d.row("columns", "indices", row)) {
      CHECK(listed.count(j) == 0);
      CHECK(j < end);
      listed.insert(j);
    }
    for (const i64 q : {begin, (begin + end) / 2, end - 1}) {
      std::vector<i64> keys;
      for (i64 j = 0; j <= q; ++j)
        if (listed.count(j) || j < sinks || q - j < window) keys.push_back(j);
      if (row % 5 == 0) check_query(d, row / tiles, q, keys);
    }
    for (i64 q = begin; q < end; ++q)
      for (i64 j = 0; j <= q; ++j)
        if (listed.count(j) || j < sinks || q - j < window) cells.insert(j);
    // A listed column may lie beyond the queries before it, never beyond the last.
    for (const i64 j : listed)
      if (j < end) cells.insert(j);
    const auto found = d.row("cells", "indices", row);
    CHECK(std::set<i64>(found.begin(), found.end()) == cells);
  }
}

}  // namespace

TEST_CASE("prefill rows: pieces, columns, exact parts, cells, and attention over them") {
  check_prefill({{"name", "random"}, {"density", 0.3}});
  check_prefill({{"name", "oracle_topk"}, {"density", 0.1}, {"unit", "token"}, {"gqa", "sum"}});
  check_prefill({{"name", "streaming_llm"}, {"density", 0.2}});
  check_prefill({{"name", "vertical_slash"}, {"columns", 40}, {"diagonals", 60}});
  check_prefill({{"name", "xattention"}});
  check_prefill({{"name", "dense"}});
}

TEST_CASE("a choice that a group shares stands in the rows of each of its heads") {
  const Dumped d({{"select", {{"name", "random"}, {"density", 0.3}, {"gqa", "mean"}}}}, ReplayPhase::prefill);
  const i64 tiles = (kPrompt + 63) / 64;
  for (i64 head = 0; head < kHeads; ++head)
    for (i64 t = 0; t < tiles; ++t)
      CHECK(d.row("pieces", "starts", head * tiles + t) == d.row("pieces", "starts", head / 3 * 3 * tiles + t));
  CHECK(d.tensor("scores").shape == std::vector<i64>{kKvHeads * tiles, (kPrompt + 63) / 64});
}

TEST_CASE("a row that reads everything lists aligned pieces, or every token") {
  const Dumped blocks({{"select", {{"name", "random"}, {"density", 1.0}}}}, ReplayPhase::prefill);
  CHECK(blocks.row("pieces", "starts", 2) == std::vector<i32>{0, 64, 128});
  CHECK(blocks.row("columns", "indices", 2).empty());
  const Dumped dense({{"select", {{"name", "dense"}}}}, ReplayPhase::prefill);
  CHECK(dense.row("columns", "indices", 2).size() == 192);
  CHECK(dense.note("kv_block") == "0");
}

TEST_CASE("exact parts that differ from row to row stand in tensors of their own") {
  const Dumped d({{"select", {{"name", "random"}, {"density", 0.3}}},
                  {"allocate", {{"name", "duo"}, {"sinks", 4}, {"recent", 20}, {"classes", {{"2", {1}}}}}}},
                 ReplayPhase::prefill);
  const auto* sinks = static_cast<const i32*>(d.tensor("exact_sinks").data);
  CHECK(d.tensor("exact_window").shape == std::vector<i64>{d.rows("pieces")});
  CHECK(sinks[0] == 4);
  CHECK(sinks[d.rows("pieces") - 1] == 0);
  CHECK(d.note("exact_window") == "20");
}

TEST_CASE("decode rows: every token that a step reads, by original position, also after an eviction") {
  for (const bool evict : {false, true}) {
    Json roles = {{"select", {{"name", "quest"}, {"density", 0.3}, {"dense_layers", Json::array()}}}};
    if (evict) roles["evict"] = {{"name", "snapkv"}, {"density", 0.5}};
    const Dumped d(roles, ReplayPhase::decode);
    CHECK(d.number("first_query") == kPrompt);
    REQUIRE(d.rows("tokens") == kSteps * kHeads);
    for (i64 step = 0; step < kSteps; ++step)
      for (i64 head = 0; head < kHeads; ++head) {
        const auto tokens = d.row("tokens", "indices", step * kHeads + head);
        CHECK(tokens.back() == kPrompt + step);
        CHECK(tokens == d.row("cells", "indices", step * kHeads + head));
        check_query(d, head, kPrompt + step, {tokens.begin(), tokens.end()});
      }
    CHECK(d.tensor("scores").shape[0] == kSteps * kHeads);
  }
}

TEST_CASE("sampling: log weights stand beside the tokens") {
  const Dumped d({{"select", {{"name", "magicpig"}, {"bits", 4}, {"tables", 20}}}}, ReplayPhase::decode);
  REQUIRE(d.tensor("tokens.log_weight").elements() == d.tensor("tokens.indices").elements());
  const float* w = d.floats("tokens.log_weight");
  CHECK(std::any_of(w, w + d.tensor("tokens.log_weight").elements(), [](float x) { return x > 0; }));
  CHECK(w[0] == 0.f);  // a sink
}

TEST_CASE("log weights follow their tokens through an eviction") {
  const Dumped d({{"select", {{"name", "magicpig"}, {"bits", 4}, {"tables", 20}, {"recent", 16}}},
                  {"evict", {{"name", "snapkv"}, {"density", 0.5}}}},
                 ReplayPhase::decode);
  const auto* indptr = static_cast<const i64*>(d.tensor("tokens.indptr").data);
  const float* w = d.floats("tokens.log_weight");
  i64 weighted = 0;
  for (i64 step = 0; step < kSteps; ++step)
    for (i64 head = 0; head < kHeads; ++head) {
      const i64 row = step * kHeads + head;
      const auto tokens = d.row("tokens", "indices", row);
      double sum = 0;
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        const float weight = w[indptr[row] + static_cast<i64>(i)];
        weighted += weight != 0;
        sum += std::exp(attend_exactly(head, kPrompt + step, {tokens[i]}).lse + weight);
      }
      CHECK(d.floats("lse")[head * kSteps + step] == doctest::Approx(std::log(sum)).epsilon(1e-5));
    }
  CHECK(weighted > 0);
}

TEST_CASE("evict rows: what each KV head keeps, and every later query's attention") {
  for (const char* cut : {"end", "before_question"}) {
    const Dumped d({{"evict", {{"name", "snapkv"}, {"density", 0.25}, {"window", 16}, {"cut", cut}}}},
                   ReplayPhase::evict);
    const i64 at = d.number("cut");
    CHECK(at == (cut == std::string("end") ? kPrompt : kPrompt - 16));
    REQUIRE(d.rows("kept") == kKvHeads);
    CHECK(d.tensor("out").shape == std::vector<i64>{kHeads, kPrompt + kSteps - at, kDim});
    for (i64 head = 0; head < kHeads; ++head) {
      const auto kept = d.row("kept", "indices", head / 3);
      CHECK(kept.size() == static_cast<std::size_t>(std::floor(0.25 * static_cast<double>(at) + 0.5)));
      for (i64 q = at; q < kPrompt + kSteps; q += 3) {
        std::vector<i64> keys(kept.begin(), kept.end());
        for (i64 j = at; j <= q; ++j) keys.push_back(j);
        check_query(d, head, q, keys);
      }
    }
    CHECK(d.tensor("scores").shape == std::vector<i64>{kKvHeads, at});
  }
}

TEST_CASE("metadata: parameters as resolved, and ids") {
  const Dumped d({{"select", {{"name", "twilight"}, {"base", {{"name", "quest"}, {"density", 0.5}}}}}},
                 ReplayPhase::decode);
  const Json parameters = Json::parse(d.note("parameters")), ids = Json::parse(d.note("strategy_ids"));
  CHECK(parameters["select"]["base"]["density"] == 0.5);
  CHECK(parameters["select"]["top_p"] == 0.85);
  CHECK(parameters["seed"] == 0);
  CHECK(ids["select.base"].get<std::string>() == "quest@" + built_ins().find("quest").id());
  CHECK(d.note("trace_id") == trace().content_id());
  CHECK(d.note("engine_id").size() == 16);
  CHECK(d.note("phase") == "decode");
  CHECK_FALSE(d.has("scores"));
}

TEST_CASE("a cell without a role in the phase is an error that says why") {
  DumpOptions options;
  options.phase = ReplayPhase::decode;
  options.layer = kLayer;
  CHECK_THROWS_WITH_AS(
      dump(trace(), cell_of({{"select", {{"name", "block_topk"}, {"density", 0.5}}}}), options, "/nowhere"),
      doctest::Contains("does not select in decode"), Error);
  options.phase = ReplayPhase::prefill;
  CHECK_THROWS_AS(dump(trace(), cell_of({{"select", {{"name", "dense"}}}}), options, "/nowhere/at/all.safetensors"),
                  Error);
}
