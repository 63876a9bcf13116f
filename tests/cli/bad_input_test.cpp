#include <cstdint>
#include <filesystem>
#include <functional>

#include "cli/command.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {

/// Runs a study of one method on a trace that was spoiled.
Outcome run_on(const std::function<void(const std::string& path)>& write, const std::string& rest = "") {
  const ScratchDirectory directory;
  write(directory.file("t.safetensors"));
  write_bytes(directory.file("s.toml"), "trace.files = [\"t.safetensors\"]\nbudget.density = 0.5\n" +
                                            (rest.empty() ? "[[strategy]]\nselect = \"random\"\n" : rest));
  return run_lacuna({"run", directory.file("s.toml"), "--quiet"});
}

Outcome run_with(const std::function<void(SmallTrace&)>& spoil) {
  SmallTrace trace;
  spoil(trace);
  return run_on([&](const std::string& path) { trace.write(path); });
}

Outcome run_bytes(const std::function<void(std::string&)>& spoil) {
  return run_on([&](const std::string& path) {
    SmallTrace().write(path);
    std::string bytes = read_bytes(path);
    spoil(bytes);
    write_bytes(path, bytes);
  });
}

Outcome run_scenario(const std::string& rest) {
  return run_on([](const std::string& path) { SmallTrace().write(path); }, rest);
}

/// Replaces text of the header by text of the same length.
void replace(std::string& bytes, const std::string& from, const std::string& to) {
  REQUIRE(from.size() == to.size());
  const auto at = bytes.find(from);
  REQUIRE(at != std::string::npos);
  bytes.replace(at, from.size(), to);
}

}  // namespace

TEST_CASE("the small trace is a good one") {
  CHECK(run_with([](SmallTrace&) {}).code == 0);
}

TEST_CASE("traces that are broken files") {
  check_refused(run_bytes([](std::string& b) { b.resize(b.size() / 2); }), {"t.safetensors"});
  check_refused(run_bytes([](std::string& b) { b.resize(4); }), {"t.safetensors"});
  check_refused(run_bytes([](std::string& b) { b.clear(); }), {"t.safetensors"});
  check_refused(run_bytes([](std::string& b) { b.replace(0, 8, 8, '\x7f'); }), {"header", "t.safetensors"});
  check_refused(run_bytes([](std::string& b) { b[8] = 'x'; }), {"JSON", "t.safetensors"});
  check_refused(run_bytes([](std::string& b) {
                  // The first tensor's offsets a second time: the next one overlaps it.
                  const auto first = b.find("\"data_offsets\":["), second = b.find("\"data_offsets\":[", first + 1);
                  REQUIRE(second != std::string::npos);
                  const std::string begin = b.substr(second + 16, b.find(',', second) - second - 16);
                  replace(b, "\"data_offsets\":[" + begin,
                          "\"data_offsets\":[" + std::string(begin.size(), '0').replace(0, 1, "1"));
                }),
                {"t.safetensors"});
}

TEST_CASE("traces that say wrong things") {
  check_refused(run_with([](SmallTrace& t) {
                  t.tensors["layers.9.q"].type = StoredType::i32;
                  t.tensors["layers.9.q"].shape[2] = 32;
                }),
                {"layers.9.q"});
  check_refused(
      run_with([](SmallTrace& t) { std::swap(t.tensors["layers.9.k"].shape[0], t.tensors["layers.9.k"].shape[2]); }),
      {"layers.9.k", "expected"});
  check_refused(run_with([](SmallTrace& t) { t.tensors.erase("layers.27.v"); }), {"layers.27.v"});
  check_refused(run_with([](SmallTrace& t) { t.metadata["captured_layers"] = "9,18,27"; }), {"18"});
  check_refused(run_with([](SmallTrace& t) { t.metadata.erase("head_dim"); }), {"head_dim"});
  check_refused(run_with([](SmallTrace& t) { t.metadata["format"] = "other"; }), {"lacuna-trace"});
  check_refused(run_with([](SmallTrace& t) { t.metadata["decode_tokens"] = "33"; }), {"t.safetensors"});
  check_refused(
      run_with([](SmallTrace& t) { t.metadata["segments"] = R"([{"name": "context", "begin": 9, "end": 900}])"; }),
      {"segment"});
  check_refused(
      run_with([](SmallTrace& t) { t.metadata["segments"] = R"([{"name": "contxt", "begin": 0, "end": 9}])"; }),
      {"segment"});
  check_refused(run_with([](SmallTrace& t) { t.metadata["segments"] = "[{]"; }), {"segments"});
  check_refused(run_with([](SmallTrace& t) {
                  const std::uint16_t nan = 0x7fc0;
                  std::memcpy(t.storage["layers.27.k"].data() + 64 * 40 * 2, &nan, 2);
                }),
                {"layers.27.k", "40"});
}

TEST_CASE("traces that are not there") {
  check_refused(run_on([](const std::string&) {}), {"t.safetensors"});
  check_refused(run_lacuna({"trace", "/nowhere/t.safetensors"}), {"/nowhere/t.safetensors"});
  check_refused(run_on([](const std::string& path) { std::filesystem::create_directory(path); }), {"t.safetensors"});
}

TEST_CASE("scenarios with mistakes") {
  check_refused(run_scenario("[[strategy]\n"), {"s.toml:3:", "syntax"});
  check_refused(run_scenario("[[strategy]]\nselect = \"qest\"\n"), {"s.toml:4:10", "did you mean 'quest'"});
  check_refused(run_scenario("[[strategy]]\nselect = { name = \"quest\", page = 3 }\n"),
                {"s.toml:4:10", "'page_size'"});
  check_refused(run_scenario("[[strategy]]\nselect = { name = \"quest\", page_size = 0 }\n"),
                {"s.toml:4:10", "1..4096", "found 0"});
  check_refused(run_scenario("cost.time = true\n[[strategy]]\nselect = \"quest\"\n"),
                {"s.toml:3:", "needs a GPU", "device = \"cuda\"", "--no-cost"});
  check_refused(run_scenario("run.device = \"gpu\"\n[[strategy]]\nselect = \"quest\"\n"),
                {"s.toml:3:14", "cpu or cuda"});
  check_refused(run_scenario("[[strategy]]\nevict = { name = \"snapkv\", cut = 289 }\n"), {"cut", "288"});
  check_refused(run_scenario("[[strategy]]\nevict = { name = \"snapkv\", kernel = 8 }\n"),
                {"s.toml:4:9", "kernel is odd", "kernel = 8"});
  check_refused(run_on(
                    [](const std::string& path) {
                      SmallTrace t;
                      t.metadata["segments"] = "[]";
                      t.write(path);
                    },
                    "[[strategy]]\nevict = { name = \"snapkv\", cut = \"before_question\" }\n"),
                {"before_question", "question"});
}

TEST_CASE("usage") {
  check_refused(run_lacuna({}), {"no command", "run"});
  check_refused(run_lacuna({"rnu"}), {"did you mean 'run'"});
  check_refused(run_lacuna({"run"}), {"scenario", "lacuna run --help"});
  check_refused(run_lacuna({"run", "/nowhere.toml"}), {"/nowhere.toml"});
  check_refused(run_lacuna({"run", "/nowhere.toml", "--colour"}), {"--colour"});
  check_refused(run_lacuna({"run", "/nowhere.toml", "--density", "much"}), {"--density"});
  check_refused(run_lacuna({"describe", "qest"}), {"did you mean 'quest'"});
  check_refused(run_lacuna({"--plugin-dir", "/nowhere", "list"}), {"/nowhere"});
  const std::string shipped = LACUNA_SOURCE_DIR "/scenarios/quickstart.toml";
  check_refused(run_lacuna({"run", shipped, "--json", "/nowhere/x.json"}), {"/nowhere"});
  check_refused(run_lacuna({"run", shipped, "--density", "2"}), {"(0, 1]", "command line"});
  check_refused(run_lacuna({"run", shipped, "--device", "tpu"}), {"cpu", "tpu"});
  check_refused(run_lacuna({"run", shipped, "--set", "density=0.1"}), {"ambiguous", "evict.density=0.1"});
  check_refused(run_lacuna({"run", shipped, "--set", "select.colour=1"}), {"changes nothing"});
}

TEST_CASE("libraries that are no plug-ins are named, and the others still load") {
  const std::string bad = LACUNA_BAD_PLUGINS;
  check_refused(run_lacuna({"check", bad + "/wrong_abi.so"}), {"wrong_abi.so", "ABI"});
  check_refused(run_lacuna({"check", bad + "/no_symbol.so"}), {"no_symbol.so", "lacuna_plugin"});
  check_refused(run_lacuna({"check", bad + "/same_name_twice.so"}), {"same_name_twice.so", "twice"});
  check_refused(run_lacuna({"check", bad + "/absent.so"}), {"absent.so"});
  check_refused(run_lacuna({"check", LACUNA_SOURCE_DIR "/CMakeLists.txt"}), {"CMakeLists.txt", "shared library"});
  const ScratchDirectory directory;
  std::filesystem::copy_file(LACUNA_BUILT_INS "/quest.so", directory.file("a_copy.so"));
  std::filesystem::copy_file(bad + "/wrong_abi.so", directory.file("wrong_abi.so"));
  write_bytes(directory.file("text.so"), "no library");
  // The copy comes first and is loaded; the built-in of the same name is then the one too many.
  const Outcome o = run_lacuna({"--plugin-dir", directory.path(), "list"});
  CHECK(o.code == 0);
  CHECK(o.prints("snapkv"));
  for (const char* part : {"wrong_abi.so", "text.so", "'quest' is there already"}) CHECK(o.says(part));
}
