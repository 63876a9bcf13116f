#include "lacuna/trace/safetensors.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "lacuna/base/error.hpp"
#include "lacuna/base/json.hpp"

namespace lacuna {
namespace {

using nlohmann::json;
using sdk::i64;
using sdk::u64;

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie in the file");

constexpr u64 kPrefixBytes = 8;
constexpr u64 kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr const char* kRewrite = "Write the file again; it may be an incomplete copy.";

struct TypeRow {
  StoredType type;
  const char* name;
  i64 bytes;
};
constexpr TypeRow kTypes[] = {{StoredType::f32, "F32", 4},
                              {StoredType::f16, "F16", 2},
                              {StoredType::bf16, "BF16", 2},
                              {StoredType::i32, "I32", 4},
                              {StoredType::i64, "I64", 8}};

const TypeRow& row_of(StoredType type) {
  return *std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeRow& r) { return r.type == type; });
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// Bytes of a shape, or nothing if an extent is negative or the product does not fit.
std::optional<i64> bytes_of(const std::vector<i64>& shape, i64 element_bytes) {
  i64 total = element_bytes;
  for (const i64 extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(total, extent, &total)) return std::nullopt;
  }
  return total;
}

// Whole numbers in [0, 2^63); nothing for anything else.
std::optional<std::vector<i64>> whole_numbers(const json& list) {
  if (!list.is_array()) return std::nullopt;
  std::vector<i64> out;
  for (const json& v : list) {
    if (!v.is_number_unsigned() || v.get<u64>() > static_cast<u64>(INT64_MAX)) return std::nullopt;
    out.push_back(static_cast<i64>(v.get<u64>()));
  }
  return out;
}

struct Extent {
  u64 begin, end;
  std::string name;
};

// One entry of the header; the offsets are checked against the data's size, the data pointer is set by the caller.
std::pair<StoredTensor, Extent> read_entry(const std::string& name, const json& entry, u64 data_bytes,
                                           const std::string& path) {
  const std::string where = fmt::format("{}, tensor '{}'", path, name);
  for (const char* field : {"dtype", "shape", "data_offsets"}) {
    if (!entry.is_object() || !entry.contains(field)) {
      throw Error({"incomplete tensor in the header", fmt::format("an object with '{}'", field), excerpt(entry), where,
                   kRewrite});
    }
  }
  StoredTensor tensor;
  const json& dtype = entry["dtype"];
  const auto row =
      std::find_if(std::begin(kTypes), std::end(kTypes), [&](const TypeRow& r) { return dtype == r.name; });
  if (row == std::end(kTypes)) {
    throw Error({"unsupported dtype", "F32, F16, BF16, I32 or I64", excerpt(dtype), where,
                 "Convert the tensor to one of these."});
  }
  tensor.type = row->type;

  const std::optional<std::vector<i64>> shape = whole_numbers(entry["shape"]);
  const std::optional<i64> bytes = shape ? bytes_of(*shape, row->bytes) : std::nullopt;
  if (!bytes) {
    throw Error({"bad shape", "non-negative whole numbers whose product fits in 63 bits", excerpt(entry["shape"]),
                 where, kRewrite});
  }
  tensor.shape = *shape;

  const std::optional<std::vector<i64>> offsets = whole_numbers(entry["data_offsets"]);
  if (!offsets || offsets->size() != 2 || offsets->front() > offsets->back()) {
    throw Error(
        {"bad data_offsets", "[begin, end] with 0 <= begin <= end", excerpt(entry["data_offsets"]), where, kRewrite});
  }
  const Extent extent{static_cast<u64>(offsets->front()), static_cast<u64>(offsets->back()), name};
  if (extent.end > data_bytes) {
    throw Error({"file is truncated, or an offset lies outside it",
                 fmt::format("at least {} bytes after the header", extent.end), fmt::format("{}", data_bytes), where,
                 kRewrite});
  }
  if (extent.end - extent.begin != static_cast<u64>(*bytes)) {
    throw Error({"wrong size for the shape",
                 fmt::format("{} bytes for {} {}", *bytes, row->name, excerpt(entry["shape"])),
                 fmt::format("{} bytes", extent.end - extent.begin), where, kRewrite});
  }
  return {std::move(tensor), extent};
}

void check_cover(std::vector<Extent> extents, u64 data_bytes, const std::string& path) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  u64 cursor = 0;
  std::string previous;
  for (const Extent& e : extents) {
    if (e.begin != cursor) {
      const std::string after = previous.empty() ? "" : fmt::format(" (the end of '{}')", previous);
      throw Error({e.begin < cursor ? "tensors overlap" : "gap between tensors",
                   fmt::format("the tensor to begin at offset {}{}", cursor, after), fmt::format("{}", e.begin),
                   fmt::format("{}, tensor '{}'", path, e.name), kRewrite});
    }
    cursor = e.end;
    previous = e.name;
  }
  if (cursor != data_bytes) {
    throw Error({"bytes after the last tensor", fmt::format("{} bytes after the header", cursor),
                 fmt::format("{}", data_bytes), path, kRewrite});
  }
}

}  // namespace

i64 size_of(StoredType type) { return row_of(type).bytes; }
const char* name_of(StoredType type) { return row_of(type).name; }

i64 StoredTensor::elements() const {
  i64 n = 1;
  for (const i64 extent : shape) n *= extent;
  return n;
}
i64 StoredTensor::bytes() const { return elements() * size_of(type); }

SafetensorsFile::SafetensorsFile(const std::string& path) {
  map(path);
  try {
    read_header(path);
  } catch (...) {
    ::munmap(const_cast<std::byte*>(base_), size_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() { ::munmap(const_cast<std::byte*>(base_), size_); }

void SafetensorsFile::map(const std::string& path) {
  auto fail = [&](const char* what) {
    throw Error({what, "a readable file", std::strerror(errno), path, "Check the path and its permissions."});
  };
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a FIFO must not hang us
  if (file.get() < 0) fail("cannot open");
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) fail("cannot stat");
  if (!S_ISREG(status.st_mode)) {
    throw Error(
        {"not a file", "a safetensors file", S_ISDIR(status.st_mode) ? "a directory" : "a special file", path, ""});
  }
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ < kPrefixBytes) {
    throw Error({"file is truncated", fmt::format("at least {} bytes", kPrefixBytes), fmt::format("{}", size_), path,
                 kRewrite});
  }
  void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapped == MAP_FAILED) fail("cannot map");
  base_ = static_cast<const std::byte*>(mapped);
}

void SafetensorsFile::read_header(const std::string& path) {
  u64 header_bytes = 0;
  std::memcpy(&header_bytes, base_, kPrefixBytes);
  const u64 limit = std::min<u64>(kMaxHeaderBytes, size_ - kPrefixBytes);
  if (header_bytes > limit) {
    throw Error({"absurd header length", fmt::format("at most {} bytes in this file", limit),
                 fmt::format("{}", header_bytes), path + ", bytes 0-7",
                 "Check that this is a safetensors file and complete."});
  }
  const std::string_view text(reinterpret_cast<const char*>(base_) + kPrefixBytes, header_bytes);
  const json header = parse_json(text, "safetensors header", path);
  if (!header.is_object()) {
    throw Error({"bad safetensors header", "a JSON object", excerpt(header), path, kRewrite});
  }

  const std::byte* data = base_ + kPrefixBytes + header_bytes;
  const u64 data_bytes = size_ - kPrefixBytes - header_bytes;
  std::vector<Extent> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) throw Error({"bad __metadata__", "an object of strings", excerpt(entry), path, kRewrite});
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          throw Error(
              {"bad __metadata__", "a string", excerpt(value), fmt::format("{}, metadata '{}'", path, key), kRewrite});
        }
        metadata_[key] = value.get<std::string>();
      }
      continue;
    }
    auto [tensor, extent] = read_entry(name, entry, data_bytes, path);
    tensor.data = data + extent.begin;
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<std::uintptr_t>(size_of(tensor.type)) != 0) {
      throw Error({"tensor is not aligned", fmt::format("an address divisible by {}", size_of(tensor.type)),
                   fmt::format("byte {} of the file", kPrefixBytes + header_bytes + extent.begin),
                   fmt::format("{}, tensor '{}'", path, name),
                   "Write the file again with a current safetensors library."});
    }
    tensors_.emplace(name, std::move(tensor));
    extents.push_back(extent);
  }
  check_cover(std::move(extents), data_bytes, path);
}

void SafetensorsFile::release(const void* data, std::size_t bytes) const noexcept {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

void write_safetensors(const std::string& path, const std::map<std::string, StoredTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<std::pair<std::string, StoredTensor>> order(tensors.begin(), tensors.end());
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return size_of(a.second.type) > size_of(b.second.type); });
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  i64 offset = 0;
  for (const auto& [name, tensor] : order) {
    const std::optional<i64> bytes = bytes_of(tensor.shape, size_of(tensor.type));
    i64 end = 0;
    if (!bytes || __builtin_add_overflow(offset, *bytes, &end) || (*bytes > 0 && !tensor.data)) {
      throw Error({"cannot write tensor", "a shape of non-negative extents, with data", excerpt(json(tensor.shape)),
                   fmt::format("{}, tensor '{}'", path, name), ""});
    }
    header[name] = {{"dtype", name_of(tensor.type)}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text =
      header.is_null() ? "{}" : header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  const u64 header_bytes = text.size();

  const std::string temporary = fmt::format("{}.{}.tmp", path, ::getpid());
  auto fail = [&](const char* what) {
    const int reason = errno;
    ::unlink(temporary.c_str());
    throw Error(
        {what, "a writable place", std::strerror(reason), path, "Check that the directory exists and has room."});
  };
  const Descriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (file.get() < 0) fail("cannot create file");
  auto put = [&](const void* data, u64 bytes) {
    const auto* p = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t n = ::write(file.get(), p, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail("cannot write");
      p += n;
      bytes -= static_cast<u64>(n);
    }
  };
  put(&header_bytes, kPrefixBytes);
  put(text.data(), header_bytes);
  for (const auto& [name, tensor] : order) put(tensor.data, static_cast<u64>(tensor.bytes()));
  if (::fsync(file.get()) != 0) fail("cannot write");
  if (::rename(temporary.c_str(), path.c_str()) != 0) fail("cannot rename the finished file");
}

}  // namespace lacuna
