#include "lacuna/strategy/registry.hpp"

#include <doctest/doctest.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "expect_error.hpp"
#include "lacuna/strategy/library_id.hpp"
#include "scratch_directory.hpp"

namespace {
namespace fs = std::filesystem;
using lacuna::Registry;
using lacuna::testing::read_bytes;

const std::string kPlugins = LACUNA_TEST_PLUGINS;
std::string plugin(const std::string& name) { return kPlugins + "/" + name + ".so"; }

struct Scratch : lacuna::testing::ScratchDirectory {
  std::string file(const std::string& name, const std::string& content) const {
    lacuna::testing::write_bytes(ScratchDirectory::file(name), content);
    return ScratchDirectory::file(name);
  }
};

std::set<std::string> names(const Registry& registry) {
  std::set<std::string> out;
  for (const auto* type : registry.all()) out.insert(type->name());
  return out;
}

const std::set<std::string> kSample = {"both", "echo", "fixed", "keeper", "paired", "share", "wrap", "wrap_both"};
}  // namespace

TEST_CASE("a sound library: names, roles, ids") {
  Registry registry;
  registry.load(plugin("sample"));
  registry.load(kPlugins + "/../plugins/sample.so");  // the same file by another name
  CHECK(names(registry) == kSample);

  using Names = std::vector<std::string>;
  const std::map<std::string, Names> roles = {{"echo", {"plan", "mark"}},
                                              {"both", {"index", "score"}},
                                              {"keeper", {"retain", "attended"}},
                                              {"wrap", {"refine"}},
                                              {"wrap_both", {"refine"}},
                                              {"paired", {"score"}},
                                              {"fixed", {"mark"}},
                                              {"share", {"allocate_layers", "allocate_rows"}}};
  const std::map<std::string, std::string> uses = {{"echo", "s"},  {"both", "se"},     {"keeper", "e"},
                                                   {"wrap", "s"},  {"wrap_both", "s"}, {"paired", "s"},
                                                   {"fixed", "s"}, {"share", "a"}};
  for (const auto* type : registry.all()) {
    CAPTURE(type->name());
    CHECK(type->roles() == roles.at(type->name()));
    const std::string can =
        std::string(type->can_select() ? "s" : "") + (type->can_evict() ? "e" : "") + (type->can_allocate() ? "a" : "");
    CHECK(can == uses.at(type->name()));
    CHECK(type->id() == lacuna::library_id(plugin("sample")));
    CHECK(type->library() == fs::canonical(plugin("sample")).string());
  }
  CHECK(registry.find("fixed").always_dense());  // whatever its dense point looks like as text
  CHECK_FALSE(registry.find("echo").always_dense());
  CHECK_FALSE(registry.find("keeper").always_dense());
  CHECK(registry.find("echo").presets() == Names{"far", "wide"});
}

TEST_CASE("parameters: own ones first, then the shared ones that apply") {
  Registry registry;
  registry.load(plugin("sample"));
  const auto listed = [](const std::vector<lacuna::ParamSpec>& specs) {
    std::string out;
    for (const auto& spec : specs)
      out += (out.empty() ? "" : " ") + spec.name + (spec.shared ? "*" : "") + "=" + spec.default_json;
    return out;
  };
  using lacuna::RoleKind;
  const auto& both = registry.find("both");
  CHECK(listed(both.params()) ==
        "sinks=4 gqa*=\"none\" dense_layers*=[] recent*=0 cut*=\"end\" positions*=\"original\"");
  CHECK(listed(both.params(RoleKind::select)) == "sinks=4 gqa*=\"none\" dense_layers*=[] recent*=0");
  CHECK(listed(both.params(RoleKind::evict)) ==
        "sinks=4 gqa*=\"mean\" dense_layers*=[] recent*=0 cut*=\"end\" positions*=\"original\"");
  CHECK(listed(registry.find("share").params()) == "");
  CHECK(listed(registry.find("echo").params(RoleKind::select)) ==
        "small=3 large=5 share=0.5 flag=false way=\"near\" note=\"\" list=[1,2] classes={\"2\":[0,1],\"10\":[3]} "
        "gqa*=\"max\" dense_layers*=[0,1] sinks*=0 recent*=0");
}

TEST_CASE("what is not a plug-in is refused with one clear error") {
  const Scratch scratch;
  const std::string sample = read_bytes(plugin("sample"));
  Registry registry;
  const auto load = [&](const std::string& path) { return [&registry, path] { registry.load(path); }; };
  expect_error(load(kPlugins + "/missing.so"), {"no such plug-in", "missing.so"});
  expect_error(load(kPlugins), {"not a plug-in", "a directory"});
  expect_error(load(scratch.file(
                   "text.so", "just text, and more of it than an ELF header is long, so that only its kind is wrong")),
               {"ELF", "another kind", "text.so"});
  expect_error(load(scratch.file("empty.so", "")), {"an empty file", "empty.so"});
  expect_error(load(scratch.file("cut.so", sample.substr(0, sample.size() / 3))), {"cut off", "cut.so"});
  expect_error(load(scratch.file("head.so", sample.substr(0, 70))), {"cut off", "head.so"});
  std::string foreign = sample;
  foreign[offsetof(Elf64_Ehdr, e_machine)] = EM_S390;
  expect_error(load(scratch.file("foreign.so", foreign)), {"for this machine", "foreign.so"});
  expect_error(load(plugin("undefined_symbol")), {"cannot be loaded", "not_in_the_sdk", "undefined_symbol.so"});
  expect_error(load(plugin("no_symbol")), {"'lacuna_plugin'", "none", "no_symbol.so", "LACUNA_PLUGIN"});
  expect_error(load(plugin("foreign_symbol")), {"alias", "foreign_symbol.so"});
  expect_error(load(plugin("wrong_abi")), {"another ABI", "ABI 1.", "ABI 99.0", "wrong_abi.so", "Rebuild"});
  expect_error(load(plugin("same_name_twice")), {"'same'", "twice in one plug-in", "same_name_twice.so"});
  expect_error(load(plugin("nan_default")),
               {"'nan_default'", "default of 'share'", "not valid JSON", "nan_default.so"});
  expect_error(load(plugin("throws_while_loading")), {"strategy 1 of 1", "null", "info()", "throws_while_loading.so"});
  CHECK(registry.all().empty());
  registry.load(plugin("sample"));
  CHECK(names(registry) == kSample);
}

TEST_CASE("a name that another library has: nothing of the second library is added") {
  Registry registry;
  registry.load(plugin("twin_a"));
  expect_error([&] { registry.load(plugin("twin_b")); }, {"'twin' is there already", "twin_a.so", "twin_b.so"});
  CHECK(registry.find("twin").library().find("twin_a.so") != std::string::npos);
  CHECK(registry.all().size() == 1);
}

TEST_CASE("a directory: bad libraries are reported, the others load") {
  Registry registry;
  registry.load_directory(kPlugins);
  for (const auto& name : kSample) CHECK_NOTHROW(registry.find(name));
  std::size_t reported = 0;
  for (const std::string bad : {"foreign_symbol", "nan_default", "no_symbol", "same_name_twice", "throws_while_loading",
                                "twin_b", "undefined_symbol", "wrong_abi"}) {
    std::size_t hits = 0;
    const std::string file = fs::canonical(plugin(bad)).string();
    for (const auto& failure : registry.failures()) hits += failure.find(file) != std::string::npos;
    CAPTURE(bad);
    CHECK(hits == 1);
    reported += hits;
  }
  CHECK(reported == registry.failures().size());
  expect_error([&] { registry.load_directory(kPlugins + "/nowhere"); }, {"no such plug-in directory", "nowhere"});
}

TEST_CASE("the standard places") {
  const Scratch scratch;
  fs::copy_file(plugin("twin_a"), fs::path(scratch.path()) / "twin.so");
  setenv("LACUNA_PLUGIN_PATH", (scratch.path() + "::" + scratch.path() + "/nowhere").c_str(), 1);
  Registry registry;
  registry.load_standard({kPlugins});
  unsetenv("LACUNA_PLUGIN_PATH");
  CHECK(registry.find("twin").library() ==
        fs::canonical(plugin("twin_a")).string());  // the directory given comes first
  const auto failed = [&](const std::string& text) {
    for (const auto& failure : registry.failures()) {
      if (failure.find(text) != std::string::npos) return true;
    }
    return false;
  };
  CHECK(failed("/nowhere"));
  CHECK(failed("twin.so"));
  CHECK_NOTHROW(registry.find("quest"));  // beside the library
  expect_error([] { Registry().load_standard({"/nowhere/at/all"}); }, {"no such plug-in directory"});
}

TEST_CASE("an unknown name: the nearest ones") {
  Registry registry;
  registry.load(plugin("sample"));
  expect_error([&] { registry.find("ecco"); }, {"unknown strategy 'ecco'", "'echo'"});
  expect_error([&] { registry.find("something else"); }, {"both, echo, fixed, keeper, paired, share, wrap, wrap_both"});
}

TEST_CASE("library ids: of what is loaded, and of nothing else") {
  const Scratch scratch;
  const std::string original = read_bytes(plugin("twin_a"));
  const std::string id = lacuna::library_id(plugin("twin_a"));
  CHECK(id.size() == 16);
  CHECK(lacuna::library_id(scratch.file("copy.so", original)) == id);
  CHECK(original != read_bytes(plugin("twin_b")));
  CHECK(lacuna::library_id(plugin("twin_b")) == id);  // only the build id differs
  CHECK(lacuna::library_id(plugin("sample")) != id);

  Elf64_Ehdr header;
  std::memcpy(&header, original.data(), sizeof header);
  std::string stripped = original;
  stripped[offsetof(Elf64_Ehdr, e_shnum)] = 0;
  CHECK(lacuna::library_id(scratch.file("stripped.so", stripped + "debug information")) == id);
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    std::memcpy(&segment, original.data() + header.e_phoff + i * sizeof segment, sizeof segment);
    if (segment.p_type != PT_LOAD || segment.p_filesz == 0) continue;
    std::string changed = original;
    changed[segment.p_offset + segment.p_filesz - 1] ^= 1;
    CAPTURE(i);
    CHECK(lacuna::library_id(scratch.file("changed.so", changed)) != id);
  }
}
