#include "lacuna/trace/safetensors.hpp"

#include <sys/stat.h>

#include "sample.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

void write_raw(const std::string& path, const std::string& header, std::size_t data_bytes, sdk::u64 header_bytes) {
  write_bytes(path,
              std::string(reinterpret_cast<const char*>(&header_bytes), 8) + header + std::string(data_bytes, '\1'));
}

struct BadFile {
  std::string name, header;
  std::size_t data_bytes;
  std::vector<std::string> parts;
};

}  // namespace

TEST_CASE("safetensors: what is written is read, atomically and aligned") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  const sdk::i64 wide[] = {1, -2, 3};
  const float scalar = 2.5f;
  const sdk::u16 halves[] = {1, 2, 3};
  const sdk::i32 words[] = {-5};
  const std::map<std::string, StoredTensor> tensors = {
      {"a.half", {StoredType::f16, {3}, halves}},   {"b.bf16", {StoredType::bf16, {1, 3}, halves}},
      {"c.scalar", {StoredType::f32, {}, &scalar}}, {"d.words", {StoredType::i32, {1}, words}},
      {"e.wide", {StoredType::i64, {3}, wide}},     {"f.empty", {StoredType::f32, {4, 0}, nullptr}}};
  const std::map<std::string, std::string> metadata = {{"quote", "\"\\\n"}, {"name", "Ψ"}};
  write_safetensors(path, tensors, metadata);

  const SafetensorsFile file(path);
  CHECK(file.metadata() == metadata);
  REQUIRE(file.tensors().size() == tensors.size());
  for (const auto& [name, expected] : tensors) {
    CAPTURE(name);
    const StoredTensor& found = file.tensors().at(name);
    CHECK(found.type == expected.type);
    CHECK(found.shape == expected.shape);
    REQUIRE(found.bytes() == expected.bytes());
    if (found.bytes() > 0) CHECK(std::memcmp(found.data, expected.data, static_cast<std::size_t>(found.bytes())) == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(found.data) % static_cast<std::uintptr_t>(size_of(found.type)) == 0);
  }
  file.release(file.bytes().data(), file.bytes().size());
  CHECK(*static_cast<const float*>(file.tensors().at("c.scalar").data) == 2.5f);

  write_safetensors(path, file.tensors(), {});  // over the mapped file: the old one stays whole
  CHECK(static_cast<const sdk::i64*>(file.tensors().at("e.wide").data)[1] == -2);
  CHECK(SafetensorsFile(path).metadata().empty());
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.file("")), {}) == 1);  // no temporary is left
}

TEST_CASE("safetensors: writing says what cannot be written") {
  const ScratchDirectory scratch;
  const float x = 1;
  check_error([&] { write_safetensors(scratch.file("no/such/a.safetensors"), {}, {}); },
              {"cannot create file", "No such file or directory", "no/such/a.safetensors"});
  check_error(
      [&] {
        write_safetensors(scratch.file("a"), {{"x", {StoredType::f32, {-1}, &x}}}, {});
      },
      {"cannot write tensor", "tensor 'x'", "[-1]"});
  CHECK_FALSE(std::filesystem::exists(scratch.file("a")));
}

TEST_CASE("safetensors: a place that is no file") {
  const ScratchDirectory scratch;
  check_error([&] { SafetensorsFile(scratch.file("none")); }, {"cannot open", "No such file", scratch.file("none")});
  check_error([&] { SafetensorsFile(scratch.file("")); }, {"not a file", "a directory"});
  REQUIRE(mkfifo(scratch.file("pipe").c_str(), 0600) == 0);
  check_error([&] { SafetensorsFile(scratch.file("pipe")); }, {"not a file", "a special file"});
}

TEST_CASE("safetensors: every truncation of a file is an error") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  SampleTrace().write(path);
  const std::string whole = read_bytes(path);
  for (std::size_t size = 0; size < whole.size(); size += 13) {
    CAPTURE(size);
    write_bytes(path, whole.substr(0, size));
    check_error([&] { SafetensorsFile{path}; }, {"expected", "found", path});
  }
  write_bytes(path, whole.substr(0, whole.size() - 1));
  check_error([&] { SafetensorsFile{path}; }, {"file is truncated", "bytes after the header", "tensor '"});
  write_bytes(path, whole + "x");
  check_error([&] { SafetensorsFile{path}; }, {"bytes after the last tensor"});
}

TEST_CASE("safetensors: absurd header lengths") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  for (const sdk::u64 length : {sdk::u64{11}, sdk::u64{100'000'001}, sdk::u64{1} << 63, ~sdk::u64{0}, ~sdk::u64{7}}) {
    write_raw(path, "{}        ", 0, length);
    check_error([&] { SafetensorsFile{path}; },
                {"absurd header length", "at most 10 bytes", std::to_string(length), path + ", bytes 0-7"});
  }
  write_raw(path, "{}        ", 0, 10);
  CHECK(SafetensorsFile(path).tensors().empty());
}

TEST_CASE("safetensors: bad headers") {
  const ScratchDirectory scratch;
  const std::string x = R"("x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})";
  const BadFile cases[] = {
      {"empty", "", 0, {"not valid JSON"}},
      {"not JSON", "{\"x\": ", 0, {"safetensors header is not valid JSON", "line 1"}},
      {"binary", std::string("\x80\0\xff", 3), 0, {"not valid JSON"}},
      {"list", "[]", 0, {"bad safetensors header", "a JSON object", "[]"}},
      {"twice", "{" + x + "," + x + "}", 8, {"names a key twice", "\"x\" a second time"}},
      {"metadata list", R"({"__metadata__": []})", 0, {"bad __metadata__", "an object of strings"}},
      {"metadata null", R"({"__metadata__": null})", 0, {"bad __metadata__"}},
      {"metadata number", R"({"__metadata__": {"a": 1}})", 0, {"bad __metadata__", "metadata 'a'", "found 1"}},
      {"no object", R"({"x": 3})", 0, {"incomplete tensor", "'dtype'", "tensor 'x'"}},
      {"no shape", R"({"x": {"dtype": "F32", "data_offsets": [0, 8]}})", 8, {"incomplete tensor", "'shape'"}},
      {"no offsets", R"({"x": {"dtype": "F32", "shape": [2]}})", 8, {"incomplete tensor", "'data_offsets'"}},
      {"dtype",
       R"({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}})",
       8,
       {"unsupported dtype", "\"F8_E4M3\"", "BF16"}},
      {"dtype number",
       R"({"x": {"dtype": 4, "shape": [8], "data_offsets": [0, 8]}})",
       8,
       {"unsupported dtype", "found 4"}},
      {"negative extent",
       R"({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}})",
       8,
       {"bad shape", "[-2]"}},
      {"fraction", R"({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}})", 8, {"bad shape", "[2.0]"}},
      {"overflow",
       R"({"x": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}})",
       0,
       {"bad shape", "63 bits"}},
      {"overflow times 0",
       R"({"x": {"dtype": "F32", "shape": [4611686018427387904, 4, 0], "data_offsets": [0, 0]}})",
       0,
       {"bad shape"}},
      {"extent of 2^64",
       R"({"x": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 8]}})",
       8,
       {"bad shape"}},
      {"extent of 2^63",
       R"({"x": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 8]}})",
       8,
       {"bad shape"}},
      {"one offset", R"({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8]}})", 8, {"bad data_offsets", "[8]"}},
      {"backward",
       R"({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}})",
       8,
       {"bad data_offsets", "[8,0]"}},
      {"negative offset", R"({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}})", 8, {"bad data_offsets"}},
      {"beyond",
       R"({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})",
       8,
       {"an offset lies outside", "at least 12", "found 8"}},
      {"size",
       R"({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}})",
       8,
       {"wrong size", "12 bytes for F32 [3]", "found 8 bytes"}},
      {"overlap",
       "{" + x + R"(, "y": {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]}})",
       8,
       {"tensors overlap", "tensor 'y'", "the end of 'x'"}},
      {"same place",
       "{" + x + R"(, "y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})",
       8,
       {"tensors overlap", "tensor 'y'"}},
      {"gap",
       "{" + x + R"(, "y": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}})",
       16,
       {"gap between tensors", "offset 8", "found 12"}},
      {"gap first",
       R"({"y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})",
       8,
       {"gap between tensors", "offset 0", "found 4"}},
      {"rest", "{" + x + "}", 9, {"bytes after the last tensor", "expected 8", "found 9"}},
  };
  for (const BadFile& c : cases) {
    CAPTURE(c.name);
    const std::string path = scratch.file("a.safetensors");
    std::string header = c.header;
    if (!header.empty()) header.append((8 - header.size() % 8) % 8, ' ');
    write_raw(path, header, c.data_bytes, header.size());
    std::vector<std::string> parts = c.parts;
    parts.push_back(path);
    check_error([&] { SafetensorsFile{path}; }, parts);
  }
}

TEST_CASE("safetensors: a tensor that is not aligned is refused, not read") {
  const ScratchDirectory scratch;
  const std::string path = scratch.file("a.safetensors");
  const std::string header = R"({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})";
  write_raw(path, header + std::string(9 - header.size() % 8, ' '), 8, header.size() + 9 - header.size() % 8);
  check_error([&] { SafetensorsFile{path}; }, {"tensor is not aligned", "divisible by 4", "tensor 'x'"});
}
