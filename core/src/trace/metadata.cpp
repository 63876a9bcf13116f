#include "metadata.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>

#include "lacuna/base/error.hpp"
#include "lacuna/base/json.hpp"

namespace lacuna {
namespace {

using nlohmann::json;
using sdk::i64;

constexpr int kMaxLayers = 1 << 16, kMaxHeads = 1 << 16, kMaxHeadDim = 1024;
constexpr i64 kMaxTokens = INT32_MAX;  // positions are 32-bit

const std::vector<std::string> kSegmentNames = {"context", "needle", "question", "answer"};

std::string in_quotes(const std::string& text) { return "'" + text + "'"; }

i64 whole_number(const std::string& text, const std::string& field, const std::string& where) {
  i64 value = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (status != std::errc() || end != text.data() + text.size() || value < 0 || value > INT32_MAX) {
    throw Error({"bad metadata field", "a whole number from 0 to 2147483647", in_quotes(text),
                 fmt::format("{}, metadata '{}'", where, field), ""});
  }
  return value;
}

// The metadata of one file, field by field; what is left at the end is provenance.
class Fields {
 public:
  Fields(std::map<std::string, std::string> fields, std::string path)
      : fields_(std::move(fields)), path_(std::move(path)) {}

  std::string text(const std::string& field) {
    const auto found = fields_.find(field);
    if (found == fields_.end()) {
      throw Error({"missing metadata field", in_quotes(field), "none", path_,
                   "Record the trace again with every field of the format."});
    }
    std::string value = found->second;
    fields_.erase(found);
    return value;
  }
  i64 number(const std::string& field) { return whole_number(text(field), field, path_); }
  json value(const std::string& field) { return parse_json(text(field), "metadata " + in_quotes(field), path_); }
  json object(const std::string& field) {
    json parsed = value(field);
    if (!parsed.is_object()) throw bad(field, "a JSON object", excerpt(parsed));
    return parsed;
  }
  void exactly(const std::string& field, const std::string& expected, const std::string& remedy) {
    const std::string found = text(field);
    if (found != expected) {
      throw Error({"not a trace that this version reads", fmt::format("{} '{}'", field, expected), in_quotes(found),
                   fmt::format("{}, metadata '{}'", path_, field), remedy});
    }
  }
  Error bad(const std::string& field, const std::string& expected, const std::string& found) const {
    return Error({"bad metadata field", expected, found, fmt::format("{}, metadata '{}'", path_, field), ""});
  }
  const std::string& path() const { return path_; }
  std::map<std::string, std::string> rest() { return std::move(fields_); }

 private:
  std::map<std::string, std::string> fields_;
  std::string path_;
};

std::vector<int> parse_layers(Fields& fields) {
  const std::string text = fields.text("captured_layers");
  std::vector<int> layers;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    layers.push_back(
        static_cast<int>(whole_number(text.substr(begin, comma - begin), "captured_layers", fields.path())));
    begin = comma + 1;
  }
  return layers;
}

// The value of each captured layer in an object {"0": ..., "9": ...}.
std::map<int, json> by_layer(Fields& fields, const std::string& field, const std::vector<int>& layers) {
  const json object = fields.object(field);
  std::map<int, json> out;
  for (const int layer : layers) {
    const auto found = object.find(std::to_string(layer));
    if (found == object.end()) throw fields.bad(field, fmt::format("a value for layer {}", layer), excerpt(object));
    out[layer] = *found;
  }
  return out;
}

RopeConfig parse_rope(const json& object, const Fields& fields) {
  if (!object.is_object()) throw fields.bad("rope", "an object with rope_type and rope_theta", excerpt(object));
  auto has = [&](const char* key) { return object.contains(key) && !object[key].is_null(); };
  auto number = [&](const char* key, double fallback) {
    if (!has(key)) return fallback;
    if (!object[key].is_number()) throw fields.bad("rope", fmt::format("a number for {}", key), excerpt(object[key]));
    return object[key].get<double>();
  };
  if (!has("rope_theta")) throw fields.bad("rope", "rope_theta", excerpt(object));
  if (has("rope_type") && !object["rope_type"].is_string()) {
    throw fields.bad("rope", "a string for rope_type", excerpt(object["rope_type"]));
  }
  if (number("partial_rotary_factor", 1) != 1) {
    throw fields.bad("rope", "every channel rotated",
                     fmt::format("partial_rotary_factor {}", number("partial_rotary_factor", 1)));
  }
  if (has("truncate") && !object["truncate"].is_boolean()) {
    throw fields.bad("rope", "true or false for truncate", excerpt(object["truncate"]));
  }
  RopeConfig c;
  if (has("rope_type")) c.type = object["rope_type"].get<std::string>();
  c.theta = number("rope_theta", c.theta);
  if (c.type != "default" && !has("factor"))
    throw fields.bad("rope", "factor for rope_type " + c.type, excerpt(object));
  c.factor = number("factor", c.factor);
  c.low_freq_factor = number("low_freq_factor", c.low_freq_factor);
  c.high_freq_factor = number("high_freq_factor", c.high_freq_factor);
  c.original_max_position = number("original_max_position_embeddings", c.original_max_position);
  c.beta_fast = number("beta_fast", c.beta_fast);
  c.beta_slow = number("beta_slow", c.beta_slow);
  c.attention_factor = number("attention_factor", c.attention_factor);
  c.truncate = !has("truncate") || object["truncate"].get<bool>();
  const double mscale = number("mscale", 0), mscale_all_dim = number("mscale_all_dim", 0);
  if (c.attention_factor == 0 && mscale != 0 && mscale_all_dim != 0 && c.factor > 1) {
    const double log_factor = 0.1 * std::log(c.factor);
    c.attention_factor = (mscale * log_factor + 1) / (mscale_all_dim * log_factor + 1);
  }
  return c;
}

std::map<int, RopeConfig> parse_ropes(Fields& fields, TraceInfo& info) {
  const json object = fields.object("rope");
  const bool by_kind = object.contains("full_attention") || object.contains("sliding_attention");
  info.mixed_layers = object.contains("full_attention") && object.contains("sliding_attention");
  std::map<int, RopeConfig> out;
  for (const int layer : info.captured_layers) {
    const char* kind = info.sliding_window.at(layer) > 0 ? "sliding_attention" : "full_attention";
    if (by_kind && !object.contains(kind)) {
      throw fields.bad("rope", fmt::format("'{}' for layer {}", kind, layer), excerpt(object));
    }
    out[layer] = parse_rope(by_kind ? object[kind] : object, fields);
  }
  return out;
}

std::vector<Segment> parse_segments(Fields& fields) {
  const json list = fields.value("segments");
  if (!list.is_array()) throw fields.bad("segments", "a JSON list", excerpt(list));
  std::vector<Segment> out;
  for (const json& s : list) {
    auto bound = [&](const char* key) { return s.is_object() && s.contains(key) && s[key].is_number_integer(); };
    const bool named = s.is_object() && s.contains("name") && s["name"].is_string();
    if (!named || !bound("begin") || !bound("end")) {
      throw fields.bad("segments", "{name, begin, end} with whole numbers", excerpt(s));
    }
    out.push_back({s["name"].get<std::string>(), s["begin"].get<i64>(), s["end"].get<i64>()});
  }
  return out;
}

}  // namespace

TraceInfo parse_metadata(const std::map<std::string, std::string>& metadata, const std::string& path) {
  Fields fields(metadata, path);
  fields.exactly("format", "lacuna-trace", "Only files recorded as traces can be replayed.");
  fields.exactly("version", "1", "Use the version of Lacuna that recorded it, or record it again.");

  TraceInfo info;
  info.path = path;
  info.model = fields.text("model");
  info.captured_layers = parse_layers(fields);
  info.num_layers = static_cast<int>(fields.number("num_layers"));
  info.num_qo_heads = static_cast<int>(fields.number("num_qo_heads"));
  info.num_kv_heads = static_cast<int>(fields.number("num_kv_heads"));
  info.head_dim = static_cast<int>(fields.number("head_dim"));
  info.prefill_tokens = fields.number("prefill_tokens");
  info.decode_tokens = fields.number("decode_tokens");

  for (const auto& [layer, scale] : by_layer(fields, "softmax_scale", info.captured_layers)) {
    if (!scale.is_number())
      throw fields.bad("softmax_scale", fmt::format("a number for layer {}", layer), excerpt(scale));
    info.softmax_scale[layer] = scale.get<float>();
  }
  for (const auto& [layer, window] : by_layer(fields, "sliding_window", info.captured_layers)) {
    const bool whole =
        window.is_number_unsigned() && window.get<sdk::u64>() >= 1 && window.get<sdk::u64>() <= INT64_MAX;
    if (!window.is_null() && !whole) {
      throw fields.bad("sliding_window", fmt::format("null or a whole number above 0 for layer {}", layer),
                       excerpt(window));
    }
    info.sliding_window[layer] = whole ? window.get<i64>() : 0;
  }
  info.rope = parse_ropes(fields, info);
  const std::string applied = fields.text("rope_applied");
  if (applied != "true" && applied != "false") throw fields.bad("rope_applied", "true or false", in_quotes(applied));
  info.rope_applied = applied == "true";
  info.segments = parse_segments(fields);
  info.provenance = fields.rest();
  validate(info, path);
  if (const auto shared = info.provenance.find("shared_prefix"); shared != info.provenance.end()) {
    if (whole_number(shared->second, "shared_prefix", path) > info.tokens()) {
      throw fields.bad("shared_prefix", fmt::format("at most the trace's {} tokens", info.tokens()),
                       in_quotes(shared->second));
    }
  }
  return info;
}

void validate(TraceInfo& info, const std::string& where) {
  auto require = [&](bool good, const char* field, const std::string& expected, const std::string& found) {
    if (!good) throw Error({"bad metadata field", expected, found, fmt::format("{}, metadata '{}'", where, field), ""});
  };
  auto within = [&](const char* field, i64 value, i64 low, i64 high) {
    require(value >= low && value <= high, field, fmt::format("a number from {} to {}", low, high),
            std::to_string(value));
  };
  within("num_layers", info.num_layers, 1, kMaxLayers);
  within("num_qo_heads", info.num_qo_heads, 1, kMaxHeads);
  within("num_kv_heads", info.num_kv_heads, 1, info.num_qo_heads);
  require(info.num_qo_heads % info.num_kv_heads == 0, "num_kv_heads",
          fmt::format("a divisor of num_qo_heads {}", info.num_qo_heads), std::to_string(info.num_kv_heads));
  within("head_dim", info.head_dim, 2, kMaxHeadDim);
  require(info.head_dim % 2 == 0, "head_dim", "an even number", std::to_string(info.head_dim));
  within("prefill_tokens", info.prefill_tokens, 1, kMaxTokens);
  within("decode_tokens", info.decode_tokens, 0, kMaxTokens - info.prefill_tokens);

  std::sort(info.captured_layers.begin(), info.captured_layers.end());
  require(!info.captured_layers.empty(), "captured_layers", "at least one layer", "none");
  const auto twice = std::adjacent_find(info.captured_layers.begin(), info.captured_layers.end());
  require(twice == info.captured_layers.end(), "captured_layers", "each layer once",
          fmt::format("{}", fmt::join(info.captured_layers, ",")));
  for (const int layer : info.captured_layers) {
    require(layer >= 0 && layer < info.num_layers, "captured_layers",
            fmt::format("layers from 0 to {}", info.num_layers - 1), std::to_string(layer));
    require(info.softmax_scale.count(layer) > 0, "softmax_scale", fmt::format("a value for layer {}", layer), "none");
    const float scale = info.softmax_scale[layer];
    require(std::isfinite(scale) && scale > 0, "softmax_scale", fmt::format("a number above 0 for layer {}", layer),
            fmt::format("{}", scale));
    const i64 window = info.sliding_window[layer];
    require(window >= 0, "sliding_window", fmt::format("none or a number above 0 for layer {}", layer),
            std::to_string(window));
    try {
      Rope(info.rope[layer], info.head_dim);
    } catch (const Error& e) {
      Problem problem = e.problem();
      problem.where = fmt::format("{}, metadata 'rope', layer {}", where, layer);
      throw Error(std::move(problem));
    }
  }

  for (const Segment& s : info.segments) {
    if (std::find(kSegmentNames.begin(), kSegmentNames.end(), s.name) == kSegmentNames.end()) {
      throw Error({"unknown segment", fmt::format("{}", fmt::join(kSegmentNames, ", ")), in_quotes(s.name),
                   fmt::format("{}, metadata 'segments'", where), suggestion(s.name, kSegmentNames)});
    }
    require(0 <= s.begin && s.begin < s.end && s.end <= info.tokens(), "segments",
            fmt::format("0 <= begin < end <= {} for '{}'", info.tokens(), s.name),
            fmt::format("[{}, {})", s.begin, s.end));
  }
}

}  // namespace lacuna
