#include "lacuna/trace/trace.hpp"

#include <cmath>
#include <limits>

#include "sample.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {
constexpr const char* kShipped = LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors";
}

TEST_CASE("a layer's tensors are the file's bytes, and stay so when another layer is read") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  const SampleTrace sample;
  sample.write(path);
  const Trace trace = Trace::open(path);
  auto same = [&](const Tensor& t, const std::string& name) {
    const std::vector<std::byte>& bytes = sample.storage.at(name);
    return t.present() && t.elements() * sdk::size_of(t.dtype) == static_cast<sdk::i64>(bytes.size()) &&
           std::memcmp(t.data, bytes.data(), bytes.size()) == 0;
  };
  const LayerTensors first = trace.layer(1), second = trace.layer(3);
  CHECK(same(first.q, "layers.1.q"));
  CHECK(same(first.k, "layers.1.k"));
  CHECK(same(first.v, "layers.1.v"));
  CHECK_FALSE(first.wo.present());
  CHECK_FALSE(first.k_pre.present());
  CHECK(same(second.wo, "layers.3.wo"));
  CHECK(same(second.k_pre, "layers.3.k_pre"));
  CHECK(second.k_pre.dtype == sdk::Dtype::f16);
  CHECK(trace.tokens().size() == 8);
  check_error([&] { trace.layer(0); }, {"layer was not captured", "one of 1, 3", path});
}

TEST_CASE("NaN and infinity are found by tensor, head and token, in every dtype and place") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  auto open_with = [&](auto spoil) {
    SampleTrace sample;
    spoil(sample);
    sample.write(path);
    return Trace::open(path);  // which does not read the layer
  };
  constexpr std::size_t kRow = SampleTrace::kHeadDim, kHead = kRow * SampleTrace::kTokens;
  const Trace bf16 = open_with([&](SampleTrace& s) { s.set("layers.1.k", kHead + 5 * kRow + 2, sdk::u16{0x7fc0}); });
  check_error([&] { bf16.layer(1); },
              {"value is not finite", "found nan", path, "tensor 'layers.1.k'", "head 1, token 5, channel 2"});
  CHECK_NOTHROW(bf16.layer(3));

  const Trace infinite =
      open_with([&](SampleTrace& s) { s.set("layers.3.q", 3 * kHead + 7 * kRow + 7, sdk::u16{0xff80}); });
  check_error([&] { infinite.layer(3); }, {"found -inf", "tensor 'layers.3.q'", "head 3, token 7, channel 7"});
  const Trace half = open_with([&](SampleTrace& s) { s.set("layers.3.k_pre", 0, sdk::u16{0x7c01}); });
  check_error([&] { half.layer(3); }, {"found nan", "tensor 'layers.3.k_pre'", "head 0, token 0, channel 0"});
  const Trace single =
      open_with([&](SampleTrace& s) { s.set("layers.3.wo", 33, std::numeric_limits<float>::infinity()); });
  check_error([&] { single.layer(3); }, {"found inf", "tensor 'layers.3.wo'", "row 1, column 1"});

  const Trace largest = open_with([&](SampleTrace& s) {  // beside NaN, but finite
    s.set("layers.1.v", 0, sdk::u16{0xff7f});
    s.set("layers.3.k_pre", 1, sdk::u16{0xfbff});
    s.set("layers.3.wo", 0, -std::numeric_limits<float>::max());
    s.set("layers.3.wo", 1, std::numeric_limits<float>::denorm_min());
  });
  CHECK_NOTHROW(largest.layer(1));
  CHECK_NOTHROW(largest.layer(3));
}

TEST_CASE("NaN in the last values of a tensor whose bytes are no multiple of 8") {
  TraceInfo info;
  info.captured_layers = {0};
  info.num_layers = info.num_qo_heads = info.num_kv_heads = 1;
  info.head_dim = 2;
  info.prefill_tokens = 1;
  info.softmax_scale[0] = 1;
  const std::vector<float> good = {1, 2};
  const Trace trace = Trace::from_memory(info, {{"layers.0.q", {{1, 1, 2}, good}},
                                                {"layers.0.k", {{1, 1, 2}, good}},
                                                {"layers.0.v", {{1, 1, 2}, {1, NAN}}},
                                                {"layers.0.wo", {{1, 2}, good}}});
  check_error([&] { trace.layer(0); }, {"tensor 'layers.0.v'", "channel 1", "trace in memory"});

  const ScratchDirectory scratch;
  SampleTrace sample;
  sample.metadata.insert_or_assign("head_dim", "2");
  sample.metadata.insert_or_assign("num_qo_heads", "1");
  sample.metadata.insert_or_assign("num_kv_heads", "1");
  sample.metadata.insert_or_assign("prefill_tokens", "5");
  sample.metadata.insert_or_assign("decode_tokens", "0");
  sample.metadata.insert_or_assign("segments", "[]");
  sample.metadata.insert_or_assign("captured_layers", "1");
  sample.tensors.clear();
  sample.put("tokens", StoredType::i32, {5});
  for (const char* name : {"layers.1.q", "layers.1.k", "layers.1.v"}) sample.put(name, StoredType::bf16, {1, 5, 2});
  sample.set("layers.1.q", 9, sdk::u16{0x7f80});
  sample.write(scratch.file("a"));
  check_error([&] { Trace::open(scratch.file("a")).layer(1); }, {"tensor 'layers.1.q'", "token 4, channel 1"});
}

TEST_CASE("the content id: the same for the same bytes, another after any flipped byte") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors"), copy = scratch.file("b.safetensors");
  SampleTrace().write(path);
  const std::string id = Trace::open(path).content_id();
  CHECK(id.size() == 16);
  std::string bytes = read_bytes(path);
  write_bytes(copy, bytes);
  CHECK(Trace::open(copy).content_id() == id);
  for (const std::size_t from_end : {1u, 2u, 100u, 1000u}) {
    bytes[bytes.size() - from_end] ^= 1;
    write_bytes(copy, bytes);
    CHECK(Trace::open(copy).content_id() != id);
    bytes[bytes.size() - from_end] ^= 1;
  }
  SampleTrace renamed;
  renamed.metadata["model"] = "another";
  renamed.write(copy);
  CHECK(Trace::open(copy).content_id() != id);
}

TEST_CASE("the shipped trace") {
  const Trace trace = Trace::open(kShipped);
  const TraceInfo& info = trace.info();
  CHECK(info.model == "SmolLM2-135M-Instruct.Q4_1");
  CHECK(info.captured_layers == std::vector<int>{0, 9, 18, 27});
  CHECK(info.num_layers == 30);
  CHECK(info.num_qo_heads == 9);
  CHECK(info.num_kv_heads == 3);
  CHECK(info.head_dim == 64);
  CHECK(info.prefill_tokens == 1996);
  CHECK(info.decode_tokens == 52);
  CHECK(info.rope.at(27).theta == 100000);
  CHECK(info.rope_applied);
  CHECK(info.segment("question")->begin == 1967);
  CHECK(info.segments.size() == 7);
  CHECK(info.provenance.at("task") == "needles");
  for (const int layer : info.captured_layers) {
    CHECK(info.layer(layer).softmax_scale == 0.125f);
    CHECK(info.layer(layer).sliding_window == 0);
    const LayerTensors t = trace.layer(layer);
    CHECK(t.q.dtype == sdk::Dtype::bf16);
    CHECK(t.q.shape == std::vector<sdk::i64>{9, 2048, 64});
    CHECK(t.wo.shape == std::vector<sdk::i64>{576, 576});
  }
  CHECK(trace.tokens().size() == 2048);
  CHECK(trace.content_id() == Trace::open(kShipped).content_id());
}

// In a trace of a real model, a key before RoPE depends on its token alone in layer 0: equal tokens, equal keys.
TEST_CASE("the shipped trace: the inverse rotation brings the keys of equal tokens of layer 0 together") {
  const Trace trace = Trace::open(kShipped);
  const TraceInfo& info = trace.info();
  const Rope rope(info.rope.at(0), info.head_dim);
  const Tensor k = trace.layer(0).k;
  const std::vector<sdk::i32> tokens = trace.tokens();
  auto key = [&](sdk::i64 token, bool before) {
    std::vector<float> row(static_cast<std::size_t>(info.head_dim));
    for (int c = 0; c < info.head_dim; ++c) row[c] = sdk::load(k.data, k.dtype, token * info.head_dim + c);
    if (before) rope.unrotate(row.data(), static_cast<double>(token));
    return row;
  };
  std::map<sdk::i32, sdk::i64> first;
  double worst = 0, rotated = 0;
  int pairs = 0;
  for (sdk::i64 t = 0; t < info.tokens(); ++t) {
    const auto [place, fresh] = first.emplace(tokens[t], t);
    if (fresh) continue;
    auto distance = [&](bool before) {
      const std::vector<float> a = key(place->second, before), b = key(t, before);
      double difference = 0, norm = 0;
      for (std::size_t c = 0; c < a.size(); ++c) {
        difference += (a[c] - b[c]) * (a[c] - b[c]);
        norm += a[c] * a[c];
      }
      return std::sqrt(difference / norm);
    };
    worst = std::max(worst, distance(true));
    rotated += distance(false);
    ++pairs;
  }
  REQUIRE(pairs > 500);
  CHECK(worst < 0.01);  // bf16
  CHECK(rotated / pairs > 0.1);
}

TEST_CASE("further traces open, and all their layers are finite") {
  const char* directory = std::getenv("LACUNA_TRACE_DIR");
  if (!directory) {
    MESSAGE("skipped: LACUNA_TRACE_DIR is not set");
    return;
  }
  int opened = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".safetensors") continue;
    CAPTURE(entry.path().string());
    const Trace trace = Trace::open(entry.path().string());
    for (const int layer : trace.info().captured_layers) CHECK_NOTHROW(trace.layer(layer));
    if (trace.info().model.rfind("gemma", 0) == 0) CHECK(trace.info().rope.at(5).theta == 1000000);
    ++opened;
  }
  CHECK(opened > 0);
}
