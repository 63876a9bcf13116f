#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/command.hpp"
#include "lacuna/trace/safetensors.hpp"

using namespace lacuna::testing;
using Json = nlohmann::ordered_json;

TEST_CASE("list") {
  const Outcome o = run_lacuna({"list"});
  CHECK(o.code == 0);
  CHECK(o.err == "");
  for (const char* part : {"name ", "quest ", "select wrapper (base quest)", "prefill, evict, decode"})
    CHECK(o.prints(part));
  const Json all = Json::parse(run_lacuna({"list", "--json"}).out);
  CHECK(static_cast<std::size_t>(std::count(o.out.begin(), o.out.end(), '\n')) == all.size() + 1);
  for (const Json& s : all) CHECK(o.prints(s["name"].get<std::string>() + " "));
}

TEST_CASE("describe says all about every strategy") {
  for (const Json& s : Json::parse(run_lacuna({"list", "--json"}).out)) {
    const Outcome o = run_lacuna({"describe", s["name"].get<std::string>()});
    CHECK(o.code == 0);
    for (const std::string key : {"summary", "library", "id", "kind"}) CHECK(o.prints(s[key].get<std::string>()));
    for (const char* part : {"paper", "rule", "parameters", "dense at"}) CHECK(o.prints(part));
  }
  const Outcome quest = run_lacuna({"describe", "quest"});
  for (const char* part :
       {"page_size = 16  (int, 1..4096)", "shared parameters", "gqa = ", "presets", "sparse_frontier"})
    CHECK(quest.prints(part));
  CHECK(run_lacuna({"describe", "snapkv"}).prints("\nconstraints\n  kernel is odd\n"));
  CHECK(run_lacuna({"describe", "snapkv"}).prints("window = 32  (int, >= 1)"));
  CHECK(run_lacuna({"describe", "twilight"}).prints(R"(base = {"name": "quest", "density": 0.25}  (strategy))"));
}

TEST_CASE("help and version") {
  for (const char* command : {"run", "list", "describe", "trace", "dump", "check"}) {
    const Outcome o = run_lacuna({command, "--help"});
    CHECK(o.code == 0);
    CHECK(o.prints("Usage: lacuna " + std::string(command)));
    CHECK(o.err == "");
  }
  CHECK(run_lacuna({"--version"}).prints("lacuna 0."));
}

TEST_CASE("trace") {
  const ScratchDirectory directory;
  SmallTrace().write(directory.file("t.safetensors"));
  const Outcome o = run_lacuna({"trace", directory.file("t.safetensors")});
  CHECK(o.code == 0);
  for (const char* part : {"layers    9, 27 of 30", "9 query, 3 KV, head_dim 64", "320 = 288 prefill + 32 decode",
                           "question  256..288", "| 9 |", "| 27 |", "entropy"})
    CHECK(o.prints(part));
}

TEST_CASE("dump") {
  const ScratchDirectory directory;
  const std::string trace = directory.file("t.safetensors"), out = directory.file("d.safetensors");
  SmallTrace().write(trace);
  const auto dump = [&](std::vector<std::string> rest) {
    std::vector<std::string> all = {"dump", "--trace", trace, "--layer", "9", "--out", out};
    all.insert(all.end(), rest.begin(), rest.end());
    return run_lacuna(all);
  };
  Outcome o = dump({"--phase", "decode", "--select", "quest", "--set", "page_size=8", "--density", "0.5", "--cells"});
  INFO(o.err);
  REQUIRE(o.code == 0);
  CHECK(o.out == "");
  {
    const lacuna::SafetensorsFile file(out);
    CHECK(file.tensors().count("cells.indices") == 1);
    CHECK(file.tensors().count("mass_kept") == 1);
  }
  o = dump({"--phase", "decode", "--select", "twilight", "--set", "select.base.density=0.5", "--set",
            "select.base.name=quest"});
  CHECK(o.code == 0);
  o = dump({"--phase", "decode", "--select", "twilight"});
  INFO(o.err);
  CHECK(o.code == 0);
  o = dump(
      {"--phase", "evict", "--evict", "snapkv", "--allocate", "ada", "--tokens", "64", "--cut", "before_question"});
  INFO(o.err);
  REQUIRE(o.code == 0);
  {
    const lacuna::SafetensorsFile file(out);
    CHECK(file.tensors().count("kept.indices") == 1);
    CHECK(file.tensors().at("kept.indices").elements() == 3 * 64);
  }
  check_refused(dump({"--phase", "decode"}), {"--select"});
  check_refused(dump({"--phase", "prefill", "--select", "dense", "--allocate", "duo"}), {"'dense' chooses by itself"});
  check_refused(dump({"--phase", "decod", "--select", "quest"}), {"did you mean 'decode'"});
  check_refused(dump({"--phase", "decode", "--select", "qest"}), {"did you mean 'quest'"});
  check_refused(dump({"--phase", "decode", "--select", "quest", "--density", "0.5", "--tokens", "3"}), {"--density"});
  check_refused(dump({"--phase", "decode", "--select", "quest", "--density", "1.5"}), {"density"});
  check_refused(dump({"--phase", "decode", "--select", "quest", "--cut", "end"}), {"--evict"});
  check_refused(dump({"--phase", "prefill", "--select", "quest", "--density", "0.5"}), {"does not select in prefill"});
  check_refused(dump({"--phase", "decode", "--select", "quest", "--set", "select.colour=1"}), {"changes nothing"});
  check_refused(run_lacuna({"dump", "--trace", trace, "--layer", "8", "--out", out, "--phase", "decode", "--select",
                            "quest", "--density", "0.5"}),
                {"9, 27", "found 8"});
}

TEST_CASE("check fails a library whose strategies fail") {
  const Outcome o = run_lacuna({"check", LACUNA_FAULTY_PLUGINS "/faulty.so"});
  CHECK(o.code == 1);
  CHECK(o.prints("FAIL  returns_nan"));
  CHECK(o.prints("FAIL  throws_in_plan"));
}
