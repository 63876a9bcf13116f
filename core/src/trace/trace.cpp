#include "lacuna/trace/trace.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

#include "lacuna/base/error.hpp"
#include "lacuna/base/hash.hpp"
#include "lacuna/trace/safetensors.hpp"
#include "metadata.hpp"

namespace lacuna {
namespace {

using sdk::Dtype;
using sdk::i32;
using sdk::i64;
using sdk::u64;

constexpr const char* kMemory = "trace in memory";

std::string tensor_name(int layer, const char* part) { return fmt::format("layers.{}.{}", layer, part); }

bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::f16 || t == Dtype::bf16; }

const char* name_of(Dtype t) {
  switch (t) {
    case Dtype::f32: return "F32";
    case Dtype::f16: return "F16";
    case Dtype::bf16: return "BF16";
    case Dtype::i32: return "I32";
    case Dtype::u16: return "U16";
    case Dtype::u8: return "U8";
  }
  return "?";
}

std::string describe(const std::vector<i64>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

// Whether a value has its exponent all ones (NaN or infinity), 8 bytes at a time: adding one at the exponent's lowest
// bit carries into the sign's place, cleared by the mask, exactly then, and never out of the lane.
bool any_not_finite(const Tensor& t) {
  const u64 mask = t.dtype == Dtype::f32    ? 0x7f8000007f800000ull
                   : t.dtype == Dtype::bf16 ? 0x7f807f807f807f80ull
                                            : 0x7c007c007c007c00ull;
  const u64 one = t.dtype == Dtype::f32    ? 0x0080000000800000ull
                  : t.dtype == Dtype::bf16 ? 0x0080008000800080ull
                                           : 0x0400040004000400ull;
  const u64 carries = t.dtype == Dtype::f32 ? 0x8000000080000000ull : 0x8000800080008000ull;
  const auto* bytes = static_cast<const unsigned char*>(t.data);
  const std::size_t size = static_cast<std::size_t>(t.elements() * sdk::size_of(t.dtype));
  u64 seen = 0;
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    u64 word;
    std::memcpy(&word, bytes + i, 8);
    seen |= (word & mask) + one;
  }
  u64 tail = 0;
  if (i < size) std::memcpy(&tail, bytes + i, size - i);
  seen |= (tail & mask) + one;
  return (seen & carries) != 0;
}

void check_finite(const Tensor& t, const std::string& name, const std::string& where) {
  if (!t.present() || !any_not_finite(t)) return;
  i64 i = 0;
  while (std::isfinite(sdk::load(t.data, t.dtype, i))) ++i;
  const i64 columns = t.shape.back();
  const std::string place = t.shape.size() == 3 ? fmt::format("head {}, token {}, channel {}", i / columns / t.shape[1],
                                                              i / columns % t.shape[1], i % columns)
                                                : fmt::format("row {}, column {}", i / columns, i % columns);
  throw Error({"value is not finite", "finite numbers", fmt::format("{}", sdk::load(t.data, t.dtype, i)),
               fmt::format("{}, tensor '{}', {}", where, name, place), "Record the trace again."});
}

}  // namespace

i64 Tensor::elements() const {
  i64 n = 1;
  for (const i64 extent : shape) n *= extent;
  return n;
}

std::optional<Segment> TraceInfo::segment(const std::string& name) const {
  const auto found = std::find_if(segments.begin(), segments.end(), [&](const Segment& s) { return s.name == name; });
  if (found == segments.end()) return std::nullopt;
  return *found;
}

sdk::Layer TraceInfo::layer(int index) const {
  if (!std::binary_search(captured_layers.begin(), captured_layers.end(), index)) {
    throw Error({"layer was not captured", fmt::format("one of {}", fmt::join(captured_layers, ", ")),
                 std::to_string(index), path.empty() ? kMemory : path, ""});
  }
  return {index, num_layers, num_qo_heads, num_kv_heads, head_dim, softmax_scale.at(index), sliding_window.at(index)};
}

struct Trace::Impl {
  TraceInfo info;
  std::string where;
  std::unique_ptr<SafetensorsFile> file;  // or else `values` and `token_ids` own the data
  std::map<std::string, std::vector<float>> values;
  std::map<std::string, std::vector<sdk::u16>> narrow_values;  // bf16
  std::vector<i32> token_ids;
  std::map<std::string, Tensor> tensors;  // those of the format
  std::atomic<int> last_layer{-1};
  std::once_flag hashed;
  std::string content_id;

  Tensor find(const std::string& name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? Tensor{} : found->second;
  }

  LayerTensors tensors_of(int layer) const {
    return {find(tensor_name(layer, "q")), find(tensor_name(layer, "k")), find(tensor_name(layer, "v")),
            find(tensor_name(layer, "wo")), find(tensor_name(layer, "k_pre"))};
  }

  // -1 in `shape` stands for any extent above 0.
  void check_tensor(const std::string& name, const std::vector<i64>& shape, bool optional) const {
    const Tensor t = find(name);
    if (!t.present()) {
      if (optional) return;
      throw Error(
          {"missing tensor", "'" + name + "'", "none", where, "Record the trace again with every captured layer."});
    }
    const bool good = std::equal(shape.begin(), shape.end(), t.shape.begin(), t.shape.end(),
                                 [](i64 expected, i64 found) { return expected < 0 ? found > 0 : found == expected; });
    const std::string place = fmt::format("{}, tensor '{}'", where, name);
    if (!good) {
      std::string expected = describe(shape);
      if (const auto any = expected.find("-1"); any != std::string::npos) expected.replace(any, 2, "d_model");
      throw Error({"wrong shape", expected, describe(t.shape), place, "It must agree with the metadata."});
    }
    const bool integers = name == "tokens";
    if (integers ? t.dtype != Dtype::i32 : !is_float(t.dtype)) {
      throw Error({"wrong dtype", integers ? "I32" : "BF16, F16 or F32", name_of(t.dtype), place, ""});
    }
  }

  void check_tensors() const {
    const i64 tokens = info.tokens(), q = info.num_qo_heads, kv = info.num_kv_heads, d = info.head_dim;
    check_tensor("tokens", {tokens}, false);
    for (const int layer : info.captured_layers) {
      check_tensor(tensor_name(layer, "q"), {q, tokens, d}, false);
      check_tensor(tensor_name(layer, "k"), {kv, tokens, d}, false);
      check_tensor(tensor_name(layer, "v"), {kv, tokens, d}, false);
      check_tensor(tensor_name(layer, "wo"), {-1, q * d}, true);
      check_tensor(tensor_name(layer, "k_pre"), {kv, tokens, d}, true);
      const LayerTensors t = tensors_of(layer);
      if (t.k.dtype != t.v.dtype) {  // they share the cache's pages
        throw Error({"K and V differ in dtype", name_of(t.k.dtype), name_of(t.v.dtype),
                     fmt::format("{}, tensor '{}'", where, tensor_name(layer, "v")), "Store both in one dtype."});
      }
    }
  }

  // By chunks, each given back once read, so that a file larger than memory is hashed too.
  std::string hash() const {
    constexpr std::size_t kChunk = 16 << 20;
    Hasher hasher;
    if (file) {
      const std::span<const std::byte> bytes = file->bytes();
      for (std::size_t begin = 0; begin < bytes.size(); begin += kChunk) {
        const std::size_t n = std::min(kChunk, bytes.size() - begin);
        hasher.add(bytes.data() + begin, n);
        file->release(bytes.data() + begin, n);
      }
      return hasher.hex();
    }
    for (const auto& [name, t] : tensors) {
      hasher.add(name).add(t.shape.data(), t.shape.size() * sizeof(i64));
      hasher.add(t.data, static_cast<std::size_t>(t.elements() * sdk::size_of(t.dtype)));
    }
    return hasher.hex();
  }
};

Trace Trace::open(const std::string& path) {
  auto impl = std::make_shared<Impl>();
  impl->where = path;
  impl->file = std::make_unique<SafetensorsFile>(path);
  impl->info = parse_metadata(impl->file->metadata(), path);
  for (const auto& [name, stored] : impl->file->tensors()) {
    Tensor t{stored.data, Dtype::f32, stored.shape};
    switch (stored.type) {
      case StoredType::f32: break;
      case StoredType::f16: t.dtype = Dtype::f16; break;
      case StoredType::bf16: t.dtype = Dtype::bf16; break;
      case StoredType::i32: t.dtype = Dtype::i32; break;
      case StoredType::i64:
        if (name == "tokens" || name.rfind("layers.", 0) == 0) {
          throw Error({"wrong dtype", name == "tokens" ? "I32" : "BF16, F16 or F32", "I64",
                       fmt::format("{}, tensor '{}'", path, name), ""});
        }
        continue;
    }
    impl->tensors.emplace(name, std::move(t));
  }
  impl->check_tensors();
  return Trace(std::move(impl));
}

Trace Trace::from_memory(TraceInfo info, std::map<std::string, std::pair<std::vector<i64>, std::vector<float>>> tensors,
                         Dtype dtype) {
  auto impl = std::make_shared<Impl>();
  impl->where = kMemory;
  if (dtype != Dtype::f32 && dtype != Dtype::bf16)
    throw Error({"a trace in memory of another type", "f32 or bf16", "", kMemory, ""});
  impl->info = std::move(info);
  validate(impl->info, kMemory);
  impl->token_ids.assign(static_cast<std::size_t>(impl->info.tokens()), 0);
  std::vector<i64> token_shape = {impl->info.tokens()};
  for (auto& [name, tensor] : tensors) {
    auto& [shape, values] = tensor;
    Tensor t{nullptr, dtype, shape};
    if (std::any_of(shape.begin(), shape.end(), [](i64 n) { return n < 1; }) ||
        t.elements() != static_cast<i64>(values.size())) {
      throw Error({"wrong number of values", "as many as the shape " + describe(shape) + " has",
                   std::to_string(values.size()), fmt::format("{}, tensor '{}'", kMemory, name), ""});
    }
    if (name == "tokens") {
      token_shape = shape;
      impl->token_ids.assign(values.begin(), values.end());
      continue;
    }
    if (dtype == Dtype::f32) {
      t.data = impl->values.emplace(name, std::move(values)).first->second.data();
    } else {
      std::vector<sdk::u16>& narrow = impl->narrow_values[name];
      narrow.resize(values.size());
      std::transform(values.begin(), values.end(), narrow.begin(), sdk::to_bf16);
      t.data = narrow.data();
      std::vector<float>().swap(values);
    }
    impl->tensors.emplace(name, std::move(t));
  }
  impl->tensors.emplace("tokens", Tensor{impl->token_ids.data(), Dtype::i32, token_shape});
  impl->check_tensors();
  return Trace(std::move(impl));
}

const TraceInfo& Trace::info() const { return impl_->info; }

LayerTensors Trace::unchecked_layer(int index) const {
  impl_->info.layer(index);
  return impl_->tensors_of(index);
}

LayerTensors Trace::layer(int index) const {
  const LayerTensors t = unchecked_layer(index);
  if (const int last = impl_->last_layer.exchange(index); impl_->file && last >= 0 && last != index) {
    const LayerTensors old = impl_->tensors_of(last);
    for (const Tensor* o : {&old.q, &old.k, &old.v, &old.wo, &old.k_pre}) {
      if (o->present()) impl_->file->release(o->data, static_cast<std::size_t>(o->elements() * sdk::size_of(o->dtype)));
    }
  }
  check_finite(t.q, tensor_name(index, "q"), impl_->where);
  check_finite(t.k, tensor_name(index, "k"), impl_->where);
  check_finite(t.v, tensor_name(index, "v"), impl_->where);
  check_finite(t.wo, tensor_name(index, "wo"), impl_->where);
  check_finite(t.k_pre, tensor_name(index, "k_pre"), impl_->where);
  return t;
}

std::vector<i32> Trace::tokens() const {
  const Tensor t = impl_->find("tokens");
  const auto* ids = static_cast<const i32*>(t.data);
  return {ids, ids + t.elements()};
}

const std::string& Trace::content_id() const {
  std::call_once(impl_->hashed, [&] { impl_->content_id = impl_->hash(); });
  return impl_->content_id;
}

}  // namespace lacuna
