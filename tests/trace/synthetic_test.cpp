#include <algorithm>
#include <cmath>

#include "sample.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

// Attention of one query head's last query: its entropy in nats, and the mass on the two sinks.
struct Attention {
  double entropy, sinks;
};
Attention last_query(const Trace& trace, int layer, int head) {
  const TraceInfo& info = trace.info();
  const LayerTensors t = trace.layer(layer);
  const sdk::i64 tokens = info.tokens(), d = info.head_dim;
  const auto* q = static_cast<const float*>(t.q.data) + (head + 1) * tokens * d - d;
  const auto* k = static_cast<const float*>(t.k.data) + head / info.layer(layer).group() * tokens * d;
  std::vector<double> p(static_cast<std::size_t>(tokens));
  double sum = 0;
  for (sdk::i64 s = 0; s < tokens; ++s) {
    double logit = 0;
    for (sdk::i64 c = 0; c < d; ++c) logit += static_cast<double>(q[c]) * k[s * d + c];
    sum += p[s] = std::exp(logit * info.softmax_scale.at(layer));
  }
  Attention out{0, (p[0] + p[1]) / sum};
  for (const double x : p) out.entropy -= x / sum * std::log(x / sum);
  return out;
}

TraceInfo small_info() {
  TraceInfo info;
  info.captured_layers = {0};
  info.num_layers = 1;
  info.num_qo_heads = 2;
  info.num_kv_heads = 1;
  info.head_dim = 4;
  info.prefill_tokens = 3;
  info.softmax_scale[0] = 0.5f;
  return info;
}

std::map<std::string, std::pair<std::vector<sdk::i64>, std::vector<float>>> small_tensors() {
  return {{"layers.0.q", {{2, 3, 4}, std::vector<float>(24, 1.f)}},
          {"layers.0.k", {{1, 3, 4}, std::vector<float>(12, 2.f)}},
          {"layers.0.v", {{1, 3, 4}, std::vector<float>(12, 3.f)}}};
}

}  // namespace

TEST_CASE("synthetic: the shape asked for, the same bits from the same seed") {
  SyntheticSpec spec;
  spec.captured_layers = {0, 2};
  spec.with_wo = true;
  spec.seed = 9;
  const Trace a = synthetic_trace(spec), b = synthetic_trace(spec);
  CHECK(a.info().tokens() == 264);
  CHECK(a.info().segment("context")->begin == 0);
  CHECK(a.info().segment("question")->end == 256);
  CHECK(a.info().segment("answer")->end == 264);
  CHECK(a.tokens().size() == 264);
  const LayerTensors t = a.layer(2);
  CHECK(t.q.shape == std::vector<sdk::i64>{4, 264, 64});
  CHECK(t.k.shape == std::vector<sdk::i64>{2, 264, 64});
  CHECK(t.wo.shape == std::vector<sdk::i64>{256, 256});
  CHECK_FALSE(t.k_pre.present());
  CHECK(a.content_id() == b.content_id());
  spec.seed = 10;
  CHECK(synthetic_trace(spec).content_id() != a.content_id());
  CHECK(std::memcmp(a.layer(0).k.data, a.layer(2).k.data, 1000) != 0);
}

TEST_CASE("synthetic: sinks hold mass, and entropy falls from head to head") {
  SyntheticSpec spec;
  spec.num_qo_heads = 6;
  double first = 0, last = 0, sinks = 0;
  constexpr int kSeeds = 8;
  for (int seed = 0; seed < kSeeds; ++seed) {
    spec.seed = static_cast<std::uint64_t>(seed);
    const Trace trace = synthetic_trace(spec);
    first += last_query(trace, 0, 0).entropy / kSeeds;
    last += last_query(trace, 0, 5).entropy / kSeeds;
    sinks += last_query(trace, 0, 3).sinks / kSeeds;
  }
  CHECK(first > 4);
  CHECK(last < first - 1.5);
  CHECK(sinks > 0.1);
}

TEST_CASE("synthetic: the smallest one, and impossible ones") {
  SyntheticSpec spec;
  spec.num_qo_heads = spec.num_kv_heads = 1;
  spec.head_dim = 2;
  spec.prefill_tokens = 1;
  spec.decode_tokens = 0;
  const Trace trace = synthetic_trace(spec);
  CHECK(trace.info().segments.size() == 1);
  CHECK_NOTHROW(trace.layer(0));
  spec.num_kv_heads = 0;
  check_error([&] { synthetic_trace(spec); }, {"metadata 'num_kv_heads'", "found 0"});
}

TEST_CASE("in memory: validated like a file") {
  const Trace trace = Trace::from_memory(small_info(), small_tensors());
  CHECK(static_cast<const float*>(trace.layer(0).v.data)[11] == 3.f);
  CHECK(trace.tokens() == std::vector<sdk::i32>{0, 0, 0});
  CHECK(trace.info().layer(0).sliding_window == 0);
  CHECK(trace.info().rope.at(0).type == "default");

  auto tensors = small_tensors();
  tensors["tokens"] = {{3}, {4, 5, 6}};
  CHECK(Trace::from_memory(small_info(), tensors).tokens() == std::vector<sdk::i32>{4, 5, 6});
  tensors["tokens"] = {{2}, {4, 5}};
  check_error([&] { Trace::from_memory(small_info(), tensors); }, {"wrong shape", "[3]", "[2]", "trace in memory"});

  tensors = small_tensors();
  tensors["layers.0.k"].second.pop_back();
  check_error([&] { Trace::from_memory(small_info(), tensors); },
              {"wrong number of values", "found 11", "'layers.0.k'"});
  tensors.erase("layers.0.k");
  check_error([&] { Trace::from_memory(small_info(), tensors); }, {"missing tensor", "'layers.0.k'"});

  TraceInfo info = small_info();
  info.softmax_scale.clear();
  check_error([&] { Trace::from_memory(info, small_tensors()); }, {"'softmax_scale'", "a value for layer 0"});
}
