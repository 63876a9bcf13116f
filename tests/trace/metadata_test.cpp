// Every field of the metadata, each spoiled in turn.
#include <cmath>

#include "sample.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

struct BadField {
  std::string field, value;
  std::vector<std::string> parts;
};

void check_refused(const SampleTrace& sample, const std::string& path, std::vector<std::string> parts) {
  sample.write(path);
  parts.push_back(path);
  check_error([&] { Trace::open(path); }, parts);
}

}  // namespace

TEST_CASE("metadata: a whole trace is read") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  SampleTrace sample;
  sample.metadata["captured_layers"] = "3,1";
  sample.write(path);
  const Trace trace = Trace::open(path);
  const TraceInfo& info = trace.info();
  CHECK(info.path == path);
  CHECK(info.model == "sample");
  CHECK(info.captured_layers == std::vector<int>{1, 3});
  CHECK(info.tokens() == 8);
  CHECK(info.rope_applied);
  CHECK(info.provenance == std::map<std::string, std::string>{{"context_id", "genesis"}, {"shared_prefix", "5"}});
  CHECK(info.segment("answer")->begin == 6);
  CHECK_FALSE(info.segment("question").has_value());
  CHECK(info.mixed_layers);
  CHECK(info.rope.at(1).theta == 10000);  // a layer with a window uses sliding_attention
  CHECK(info.rope.at(1).type == "default");
  CHECK(info.rope.at(3).theta == 1000000);
  CHECK(info.rope.at(3).factor == 8);
  const sdk::Layer layer = info.layer(1);
  CHECK(layer.index == 1);
  CHECK(layer.num_layers == 5);
  CHECK(layer.group() == 2);
  CHECK(layer.softmax_scale == 0.25f);
  CHECK(layer.sliding_window == 4);
  CHECK(info.layer(3).sliding_window == 0);
  check_error([&] { info.layer(2); }, {"layer was not captured", "one of 1, 3", "found 2", path});
}

TEST_CASE("metadata: rope scalings are read, the ratio of mscales too") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  SampleTrace sample;
  sample.metadata["rope"] = R"({"rope_type": "llama3", "rope_theta": 500000, "factor": 8, "low_freq_factor": 1,
                                "high_freq_factor": 4, "original_max_position_embeddings": 8192})";
  sample.write(path);
  CHECK(Trace::open(path).info().rope.at(3).original_max_position == 8192);
  sample.metadata["rope"] = R"({"rope_type": "yarn", "rope_theta": 10000, "factor": 40, "beta_fast": 16, "beta_slow": 2,
                                "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0,
                                "attention_factor": null, "truncate": false})";
  sample.write(path);
  const RopeConfig yarn = Trace::open(path).info().rope.at(1);
  CHECK(yarn.beta_fast == 16);
  CHECK(yarn.beta_slow == 2);
  CHECK_FALSE(yarn.truncate);
  CHECK(yarn.attention_factor == doctest::Approx((0.0707 * std::log(40.) + 1) / (0.1 * std::log(40.) + 1)));
}

TEST_CASE("metadata: every field must be there") {
  const ScratchDirectory scratch;
  const SampleTrace whole;
  for (const auto& [field, value] : whole.metadata) {
    if (field == "context_id" || field == "shared_prefix") continue;
    CAPTURE(field);
    SampleTrace sample;
    sample.metadata.erase(field);
    check_refused(sample, scratch.file("a.safetensors"), {"missing metadata field", "'" + field + "'"});
  }
}

TEST_CASE("metadata: bad values") {
  const std::string llama3 =
      R"({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "original_max_position_embeddings": 0})";
  const BadField cases[] = {
      {"format", "pt", {"not a trace", "'lacuna-trace'", "'pt'"}},
      {"version", "2", {"not a trace that this version reads", "version '1'", "'2'"}},
      {"num_layers", "x", {"a whole number", "'x'"}},
      {"num_layers", "5.0", {"a whole number", "'5.0'"}},
      {"num_layers", "-5", {"a whole number", "'-5'"}},
      {"num_layers", " 5", {"a whole number"}},
      {"num_layers", "", {"a whole number"}},
      {"num_layers", "99999999999999999999", {"a whole number"}},
      {"num_layers", "2147483648", {"a whole number"}},
      {"num_layers", "0", {"a number from 1"}},
      {"num_layers", "3", {"metadata 'captured_layers'", "layers from 0 to 2", "found 3"}},
      {"captured_layers", "", {"a whole number"}},
      {"captured_layers", "1,,3", {"a whole number"}},
      {"captured_layers", "1,3,", {"a whole number"}},
      {"captured_layers", "1,1", {"each layer once", "1,1"}},
      {"captured_layers", "1,3,4", {"'softmax_scale'", "a value for layer 4"}},
      {"num_qo_heads", "0", {"a number from 1"}},
      {"num_qo_heads", "5", {"'num_kv_heads'", "a divisor of num_qo_heads 5", "found 2"}},
      {"num_kv_heads", "0", {"a number from 1 to 4"}},
      {"num_kv_heads", "8", {"a number from 1 to 4", "found 8"}},
      {"head_dim", "7", {"an even number", "found 7"}},
      {"head_dim", "1026", {"a number from 2 to 1024"}},
      {"head_dim", "0", {"a number from 2 to 1024"}},
      {"prefill_tokens", "0", {"a number from 1"}},
      {"decode_tokens", "-1", {"a whole number"}},
      {"decode_tokens", "2147483647", {"a number from 0 to 2147483641"}},
      {"softmax_scale", "0.125", {"a JSON object", "found 0.125"}},
      {"softmax_scale", R"({"1": 0.25})", {"a value for layer 3"}},
      {"softmax_scale", R"({"1": 0.25, "3": 0})", {"a number above 0 for layer 3"}},
      {"softmax_scale", R"({"1": 0.25, "3": -1})", {"a number above 0 for layer 3", "found -1"}},
      {"softmax_scale", R"({"1": 0.25, "3": 1e300})", {"a number above 0 for layer 3", "found inf"}},
      {"softmax_scale", R"({"1": 0.25, "3": "a"})", {"a number for layer 3"}},
      {"softmax_scale", R"({"1": 0.25, "3": NaN})", {"metadata 'softmax_scale' is not valid JSON"}},
      {"softmax_scale", R"({"1": 0.25, "3": 1, "3": 1})", {"names a key twice"}},
      {"sliding_window", R"({"1": 4})", {"a value for layer 3"}},
      {"sliding_window", R"({"1": 0, "3": null})", {"null or a whole number above 0 for layer 1", "found 0"}},
      {"sliding_window", R"({"1": -4, "3": null})", {"null or a whole number above 0 for layer 1"}},
      {"sliding_window", R"({"1": 4.5, "3": null})", {"null or a whole number above 0 for layer 1"}},
      {"rope", "[]", {"a JSON object"}},
      {"rope", R"({"rope_type": "default"})", {"rope_theta"}},
      {"rope", R"({"rope_type": 3, "rope_theta": 1e4})", {"a string for rope_type"}},
      {"rope", R"({"rope_type": "default", "rope_theta": "1e4"})", {"a number for rope_theta"}},
      {"rope", R"({"rope_type": "default", "rope_theta": 0})", {"bad rope_theta", "a number above 1", "layer 1"}},
      {"rope",
       R"({"rope_type": "lama3", "rope_theta": 1e4, "factor": 2})",
       {"unknown rope_type", "did you mean 'llama3'?", "layer 1"}},
      {"rope", R"({"rope_type": "linear", "rope_theta": 1e4})", {"factor for rope_type linear"}},
      {"rope", R"({"rope_type": "linear", "rope_theta": 1e4, "factor": 0})", {"bad factor", "above 0"}},
      {"rope", llama3, {"bad original_max_position_embeddings", "found 0"}},
      {"rope",
       R"({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})",
       {"every channel rotated", "0.5"}},
      {"rope", R"({"full_attention": {"rope_theta": 1e4}})", {"'sliding_attention' for layer 1"}},
      {"rope", R"({"sliding_attention": {"rope_theta": 1e4}})", {"'full_attention' for layer 3"}},
      {"rope", R"({"full_attention": 1, "sliding_attention": 2})", {"an object with rope_type"}},
      {"rope_applied", "yes", {"true or false", "'yes'"}},
      {"segments", "{}", {"a JSON list"}},
      {"segments", R"(["context"])", {"{name, begin, end}"}},
      {"segments", R"([{"name": "context", "begin": 0}])", {"{name, begin, end}"}},
      {"segments", R"([{"name": "context", "begin": 0, "end": 2.5}])", {"{name, begin, end}"}},
      {"segments",
       R"([{"name": "contxt", "begin": 0, "end": 2}])",
       {"unknown segment", "'contxt'", "did you mean 'context'?"}},
      {"segments", R"([{"name": "context", "begin": 2, "end": 2}])", {"0 <= begin < end <= 8", "[2, 2)"}},
      {"segments", R"([{"name": "context", "begin": -1, "end": 2}])", {"0 <= begin < end <= 8", "[-1, 2)"}},
      {"segments", R"([{"name": "context", "begin": 0, "end": 9}])", {"0 <= begin < end <= 8", "[0, 9)"}},
      {"shared_prefix", "9", {"at most the trace's 8 tokens"}},
      {"shared_prefix", "all", {"a whole number"}},
  };
  const ScratchDirectory scratch;
  for (const BadField& c : cases) {
    CAPTURE(c.field);
    CAPTURE(c.value);
    SampleTrace sample;
    sample.metadata[c.field] = c.value;
    std::vector<std::string> parts = c.parts;
    parts.push_back("metadata '");
    check_refused(sample, scratch.file("a.safetensors"), parts);
  }
}

TEST_CASE("metadata and tensors must agree") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  auto with = [&](auto spoil, std::vector<std::string> parts) {
    SampleTrace sample;
    spoil(sample);
    check_refused(sample, path, std::move(parts));
  };
  for (const char* name : {"tokens", "layers.1.q", "layers.1.k", "layers.3.v"}) {
    with([&](SampleTrace& s) { s.tensors.erase(name); }, {"missing tensor", std::string("'") + name + "'"});
  }
  with([](SampleTrace& s) { s.metadata["decode_tokens"] = "1"; }, {"metadata 'segments'", "0 <= begin < end <= 7"});
  with([](SampleTrace& s) { s.metadata["prefill_tokens"] = "7"; }, {"wrong shape", "[9]", "[8]", "tensor 'tokens'"});
  with(
      [](SampleTrace& s) {
        s.put("layers.1.q", StoredType::bf16, {4, 8, 6});
      },
      {"wrong shape", "[4, 8, 8]", "[4, 8, 6]", "tensor 'layers.1.q'"});
  with(
      [](SampleTrace& s) {
        s.put("layers.1.k", StoredType::bf16, {4, 8, 8});
      },
      {"wrong shape", "[2, 8, 8]", "'layers.1.k'"});
  with([](SampleTrace& s) { s.put("layers.1.v", StoredType::bf16, {2, 8}); }, {"wrong shape", "[2, 8, 8]", "[2, 8]"});
  with(
      [](SampleTrace& s) {
        s.put("layers.3.wo", StoredType::f32, {10, 31});
      },
      {"wrong shape", "[d_model, 32]", "[10, 31]"});
  with(
      [](SampleTrace& s) {
        s.put("layers.3.wo", StoredType::f32, {0, 32});
      },
      {"wrong shape", "[d_model, 32]", "[0, 32]"});
  with(
      [](SampleTrace& s) {
        s.put("layers.3.k_pre", StoredType::f16, {2, 7, 8});
      },
      {"wrong shape", "'layers.3.k_pre'"});
  with([](SampleTrace& s) { s.put("tokens", StoredType::i64, {8}); },
       {"wrong dtype", "expected I32, found I64", "'tokens'"});
  with([](SampleTrace& s) { s.put("tokens", StoredType::f32, {8}); }, {"wrong dtype", "expected I32, found F32"});
  with(
      [](SampleTrace& s) {
        s.put("layers.1.q", StoredType::i32, {4, 8, 8});
      },
      {"wrong dtype", "BF16, F16 or F32", "found I32"});
  with(
      [](SampleTrace& s) {
        s.put("layers.1.q", StoredType::i64, {4, 8, 8});
      },
      {"wrong dtype", "found I64", "'layers.1.q'"});
  with(
      [](SampleTrace& s) {
        s.put("layers.1.v", StoredType::f16, {2, 8, 8});
      },
      {"K and V differ in dtype", "BF16", "F16"});

  SampleTrace more;
  more.put("extra", StoredType::i64, {3});
  more.write(path);
  CHECK_NOTHROW(Trace::open(path));
}
