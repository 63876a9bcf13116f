#include "lacuna/strategy/calibration_file.hpp"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "lacuna/base/error.hpp"
#include "lacuna/base/hash.hpp"
#include "lacuna/base/write_text.hpp"
#include "lacuna/trace/safetensors.hpp"

namespace lacuna {
using sdk::i64;

namespace {

constexpr char kFormat[] = "lacuna-calibration";

bool is_safetensors(const std::string& path) { return path.ends_with(".safetensors"); }

int layer_of(const std::string& text, const std::string& where) {
  int layer = -1;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), layer);
  if (code != std::errc{} || end != text.data() + text.size() || layer < 0)
    throw Error({"a calibration array of no layer", "a layer's number", fmt::format("'{}'", text), where, ""});
  return layer;
}

CalibrationFile read_stored(const std::string& path) {
  const SafetensorsFile stored(path);
  CalibrationFile out;
  out.metadata = stored.metadata();
  if (const auto format = out.metadata.find("format"); format == out.metadata.end() || format->second != kFormat)
    throw Error({"not a calibration file", fmt::format("metadata format = {}", kFormat),
                 format == out.metadata.end() ? "none" : format->second, path, "Make one with lacuna calibrate."});
  for (const auto& [name, tensor] : stored.tensors()) {
    const auto first = name.find('.'), second = name.find('.', first + 1);
    if (!name.starts_with("layers.") || second == std::string::npos || tensor.type != StoredType::f32 ||
        tensor.shape.size() > 3)
      throw Error({fmt::format("bad tensor '{}'", name), "layers.<number>.<name>, F32, rank at most 3",
                   fmt::format("{}, rank {}", name_of(tensor.type), tensor.shape.size()), path, ""});
    const auto* values = static_cast<const float*>(tensor.data);
    out.layers[layer_of(name.substr(first + 1, second - first - 1), path)][name.substr(second + 1)] = {
        tensor.shape, {values, values + tensor.elements()}};
  }
  return out;
}

/// Adds the numbers of a nested list, all of whose lists of a depth have one length.
void flatten(const toml::array& list, std::size_t depth, CalibrationArray& out, const std::string& where) {
  const auto refuse = [&](const std::string& found) {
    throw Error({"a calibration array that is no array of numbers", "numbers, or equally long lists of them", found,
                 where, ""});
  };
  if (depth >= 3) refuse("lists nested deeper than 3");
  if (out.shape.size() == depth) {
    out.shape.resize(depth + 1);
    out.shape[depth] = static_cast<i64>(list.size());
  }
  if (out.shape[depth] != static_cast<i64>(list.size())) refuse("lists of different lengths");
  for (const toml::node& node : list) {
    if (const auto* inner = node.as_array()) {
      flatten(*inner, depth + 1, out, where);
    } else if (const auto number = node.value<double>(); number && node.is_number() && out.shape.size() == depth + 1) {
      out.values.push_back(static_cast<float>(*number));
    } else {
      refuse("another value");
    }
  }
}

CalibrationFile read_toml(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  CalibrationFile out;
  toml::table table;
  try {
    table = toml::parse(text, path);
  } catch (const toml::parse_error& e) {
    const auto begin = e.source().begin;
    throw Error({"a calibration file that is not TOML", "", std::string(e.description()),
                 fmt::format("{}:{}:{}", path, begin.line, begin.column), ""});
  }
  for (const auto& [key, node] : table) {
    const auto* inner = node.as_table();
    if (!inner || (key.str() != "layer" && key.str() != "metadata"))
      throw Error(
          {fmt::format("a calibration file with '{}'", key.str()), "[layer.N] and [metadata] alone", "", path, ""});
    for (const auto& [name, value] : *inner) {
      if (key.str() == "metadata") {
        out.metadata[std::string(name.str())] = value.value_or(std::string());
        continue;
      }
      const auto* arrays = value.as_table();
      if (!arrays) throw Error({"a layer that is no table", "[layer.N] name = [...]", "", path, ""});
      auto& layer = out.layers[layer_of(std::string(name.str()), path)];
      for (const auto& [array, list] : *arrays) {
        const std::string where = fmt::format("{}, layer {}, {}", path, name.str(), array.str());
        if (!list.as_array()) throw Error({"a calibration array that is no list", "name = [...]", "", where, ""});
        flatten(*list.as_array(), 0, layer[std::string(array.str())], where);
      }
    }
  }
  return out;
}

void write_list(std::string& out, const CalibrationArray& array, std::size_t depth, std::size_t& at) {
  out += '[';
  for (i64 i = 0; i < array.shape[depth]; ++i) {
    if (i > 0) out += ", ";
    if (depth + 1 < array.shape.size())
      write_list(out, array, depth + 1, at);
    else
      out += fmt::format("{}", array.values[at++]);
  }
  out += ']';
}

void write_toml(const CalibrationFile& file, const std::string& path) {
  toml::table metadata;
  for (const auto& [key, value] : file.metadata) metadata.insert(key, value);
  std::ostringstream head;
  head << toml::table{{"metadata", metadata}};
  std::string text = head.str() + '\n';
  for (const auto& [layer, arrays] : file.layers) {
    text += fmt::format("\n[layer.{}]\n", layer);
    for (const auto& [name, array] : arrays) {
      std::size_t at = 0;
      text += name + " = ";
      write_list(text, array, 0, at);
      text += '\n';
    }
  }
  write_text(text, path, "the calibration file");
}

}  // namespace

bool names_id(const std::string& list, const std::string& id) {
  return ("," + list + ",").find("," + id + ",") != std::string::npos;
}

const CalibrationArray* CalibrationFile::find(int layer, const std::string& name) const {
  const auto arrays = layers.find(layer);
  if (arrays == layers.end()) return nullptr;
  const auto array = arrays->second.find(name);
  return array == arrays->second.end() ? nullptr : &array->second;
}

bool CalibrationFile::made_from(const std::string& trace_id) const {
  const auto ids = metadata.find("trace_ids");
  return ids != metadata.end() && names_id(ids->second, trace_id);
}

void CalibrationFile::identify() {
  Hasher hash;
  for (const auto& [layer, arrays] : layers)
    for (const auto& [name, array] : arrays) {
      hash.add(fmt::format("{} {}", layer, name));
      hash.add(array.shape.data(), array.shape.size() * sizeof(i64));
      hash.add(array.values.data(), array.values.size() * sizeof(float));
    }
  content_id = hash.hex();
}

CalibrationFile read_calibration(const std::string& path) {
  if (!std::filesystem::is_regular_file(path))
    throw Error({"there is no such calibration file", "a file that lacuna calibrate wrote, or a table in TOML", "none",
                 path, ""});
  CalibrationFile out = is_safetensors(path) ? read_stored(path) : read_toml(path);
  out.identify();
  return out;
}

void write_calibration(const CalibrationFile& file, const std::string& path) {
  if (!is_safetensors(path)) return write_toml(file, path);
  std::map<std::string, StoredTensor> tensors;
  for (const auto& [layer, arrays] : file.layers)
    for (const auto& [name, array] : arrays)
      tensors[fmt::format("layers.{}.{}", layer, name)] = {StoredType::f32, array.shape, array.values.data()};
  std::map<std::string, std::string> metadata = file.metadata;
  metadata["format"] = kFormat;
  metadata["version"] = "1";
  write_safetensors(path, tensors, metadata);
}

}  // namespace lacuna
