// A trace whose attention looks like a model's in the ways that strategies exploit. Directly in the space after RoPE:
// keys drift (an AR(1) walk over the tokens, so near tokens are alike), two sinks share one direction and every 64th
// token or so another; a query leans to both directions and to its own key. The sharpness differs from head to head,
// and with it the entropy of the attention.
#include <cmath>
#include <string>
#include <utility>

#include "lacuna/trace/trace.hpp"
#include "metadata.hpp"

namespace lacuna {
namespace {

using sdk::i64;
using sdk::Random;
using sdk::u64;

constexpr i64 kSinks = 2;
constexpr double kHeavyShare = 1.0 / 64, kDrift = 0.9;
constexpr double kSinkLean = 1.5, kHeavyLean = 1.0, kSelfLean = 0.8, kMeanNorm = 2;
constexpr double kSharpnessLow = 0.5, kSharpnessHigh = 2.5;
constexpr i64 kQuestionTokens = 16, kVocabulary = 32000;

enum class Draw : u64 { key_noise, query_noise, value, sink_direction, heavy_direction, heavy, wo, token };

Random stream(u64 seed, int layer, Draw draw) { return {seed, static_cast<u64>(layer) * 16 + static_cast<u64>(draw)}; }

// A direction of length 1 for each KV head.
std::vector<float> direction(const Random& random, int head, int d) {
  std::vector<float> out(static_cast<std::size_t>(d));
  double norm = 0;
  for (int c = 0; c < d; ++c) {
    out[c] = random.normal(static_cast<u64>(head), static_cast<u64>(c));
    norm += static_cast<double>(out[c]) * out[c];
  }
  for (float& x : out) x = static_cast<float>(x / std::sqrt(norm));
  return out;
}

std::vector<float> gaussian(const Random& random, i64 rows, i64 columns, double scale) {
  std::vector<float> out(static_cast<std::size_t>(rows * columns));
  for (i64 r = 0; r < rows; ++r) {
#pragma omp parallel for schedule(static)
    for (i64 c = 0; c < columns; ++c) {
      out[r * columns + c] = static_cast<float>(scale * random.normal(static_cast<u64>(r), static_cast<u64>(c)));
    }
  }
  return out;
}

struct Keys {
  std::vector<float> k;                         // [num_kv_heads, tokens, head_dim]
  std::vector<std::vector<float>> sink, heavy;  // a direction for each KV head
};

Keys make_keys(const SyntheticSpec& spec, int layer, i64 tokens) {
  const int d = spec.head_dim;
  const double length = kMeanNorm * std::sqrt(d);
  const Random heavy_draw = stream(spec.seed, layer, Draw::heavy);
  Keys out;
  out.k = gaussian(stream(spec.seed, layer, Draw::key_noise), spec.num_kv_heads, tokens * d, 1);
  for (int h = 0; h < spec.num_kv_heads; ++h) {
    out.sink.push_back(direction(stream(spec.seed, layer, Draw::sink_direction), h, d));
    out.heavy.push_back(direction(stream(spec.seed, layer, Draw::heavy_direction), h, d));
    float* k = out.k.data() + h * tokens * d;
    for (i64 i = d; i < tokens * d; ++i)
      k[i] = static_cast<float>(kDrift * k[i - d] + std::sqrt(1 - kDrift * kDrift) * k[i]);
    for (i64 t = 0; t < tokens; ++t) {
      const bool heavy = heavy_draw.uniform(static_cast<u64>(h), static_cast<u64>(t)) < kHeavyShare;
      for (int c = 0; c < d; ++c) {
        if (t < kSinks) k[t * d + c] += static_cast<float>(length * out.sink[h][c]);
        if (t >= kSinks && heavy) k[t * d + c] += static_cast<float>(length * out.heavy[h][c]);
      }
    }
  }
  return out;
}

std::vector<float> make_queries(const SyntheticSpec& spec, int layer, i64 tokens, const Keys& keys) {
  const int d = spec.head_dim, group = spec.num_qo_heads / spec.num_kv_heads;
  std::vector<float> q = gaussian(stream(spec.seed, layer, Draw::query_noise), spec.num_qo_heads, tokens * d, 1);
  for (int head = 0; head < spec.num_qo_heads; ++head) {
    const double place = spec.num_qo_heads > 1 ? static_cast<double>(head) / (spec.num_qo_heads - 1) : 0.5;
    const double sharpness = kSharpnessLow + (kSharpnessHigh - kSharpnessLow) * place;
    const int h = head / group;
    for (i64 t = 0; t < tokens; ++t) {
      for (int c = 0; c < d; ++c) {
        float& x = q[(head * tokens + t) * d + c];
        const double own = keys.k[(h * tokens + t) * d + c];
        x = static_cast<float>(sharpness *
                               (x + kSinkLean * keys.sink[h][c] + kHeavyLean * keys.heavy[h][c] + kSelfLean * own));
      }
    }
  }
  return q;
}

std::vector<Segment> make_segments(const SyntheticSpec& spec) {
  const i64 prefill = spec.prefill_tokens, question = prefill > kQuestionTokens ? kQuestionTokens : prefill / 2;
  std::vector<Segment> out = {{"context", 0, prefill - question}};
  if (question > 0) out.push_back({"question", prefill - question, prefill});
  if (spec.decode_tokens > 0) out.push_back({"answer", prefill, prefill + spec.decode_tokens});
  return out;
}

}  // namespace

Trace synthetic_trace(const SyntheticSpec& spec) {
  TraceInfo info;
  info.model = "synthetic";
  info.captured_layers = spec.captured_layers;
  info.num_layers = spec.num_layers;
  info.num_qo_heads = spec.num_qo_heads;
  info.num_kv_heads = spec.num_kv_heads;
  info.head_dim = spec.head_dim;
  info.prefill_tokens = spec.prefill_tokens;
  info.decode_tokens = spec.decode_tokens;
  info.segments = make_segments(spec);
  info.provenance = {{"seed", std::to_string(spec.seed)}};
  for (const int layer : spec.captured_layers) {
    info.softmax_scale[layer] = static_cast<float>(1 / std::sqrt(static_cast<double>(spec.head_dim)));
  }
  validate(info, "synthetic trace");

  const i64 tokens = info.tokens(), d = spec.head_dim, width = spec.num_qo_heads * d;
  std::map<std::string, std::pair<std::vector<i64>, std::vector<float>>> tensors;
  for (const int layer : spec.captured_layers) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    Keys keys = make_keys(spec, layer, tokens);
    tensors[prefix + "q"] = {{spec.num_qo_heads, tokens, d}, make_queries(spec, layer, tokens, keys)};
    tensors[prefix + "k"] = {{spec.num_kv_heads, tokens, d}, std::move(keys.k)};
    tensors[prefix + "v"] = {{spec.num_kv_heads, tokens, d},
                             gaussian(stream(spec.seed, layer, Draw::value), spec.num_kv_heads, tokens * d, 1)};
    if (spec.with_wo) {
      tensors[prefix + "wo"] = {{width, width},
                                gaussian(stream(spec.seed, layer, Draw::wo), width, width, 1 / std::sqrt(width))};
    }
  }
  std::vector<float> ids;
  for (i64 t = 0; t < tokens; ++t) {
    ids.push_back(static_cast<float>(stream(spec.seed, 0, Draw::token).bits(0, static_cast<u64>(t)) % kVocabulary));
  }
  tensors["tokens"] = {{tokens}, std::move(ids)};
  return Trace::from_memory(std::move(info), std::move(tensors), spec.dtype);
}

}  // namespace lacuna
