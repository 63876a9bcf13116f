#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/command.hpp"

using namespace lacuna::testing;
using Json = nlohmann::ordered_json;

namespace {

/// A directory with the small trace and a scenario on it.
struct Study {
  explicit Study(const std::string& scenario) {
    SmallTrace().write(directory.file("t.safetensors"));
    write_bytes(path(), "trace.files = [\"t.safetensors\"]\n" + scenario);
  }
  std::string path() const { return directory.file("s.toml"); }
  ScratchDirectory directory;
};

const char* const kMethods =
    "name = \"small\"\n"
    "budget.density = [0.3, 0.5]\n"
    "[[strategy]]\nselect = [\"dense\", \"oracle_topk\", \"random\"]\n"
    "[[strategy]]\nselect = { name = \"quest\", page_size = 8, dense_layers = [] }\n"
    "[[strategy]]\nevict = [\"dense\", \"snapkv\"]\n";

/// The report without its times; the count of rows that had one.
std::size_t drop_times(Json& report) {
  std::size_t dropped = 0;
  for (Json& row : report["rows"]) dropped += row.erase("time");
  return dropped;
}

bool has_key(const Json& json, const std::string& part) {
  for (const auto& [key, value] : json.items()) {
    if (json.is_object() && key.find(part) != std::string::npos) return true;
    if (value.is_structured() && has_key(value, part)) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("a study prints its tables and progress") {
  const Study study(kMethods);
  const Outcome o = run_lacuna({"run", study.path()});
  INFO(o.err);
  REQUIRE(o.code == 0);
  for (const char* part :
       {"# small", "t.safetensors (id ", "- device: ", "- build: lacuna ", "## prefill, density 0.3",
        "## prefill, density 0.5", "## evict, density 0.3, cut = end", "## decode, density 0.5", "noise floor",
        "blind spot", "no interval", "## Skipped", "'quest' does not select in prefill"})
    CHECK_MESSAGE(o.prints(part), std::string(part));
  CHECK_FALSE(o.prints("## Failed"));
  // One line a layer and phase, counts alone.
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 6);
  CHECK(o.says("layer 9 prefill: "));
  CHECK(o.says("(6/6)"));
  CHECK(run_lacuna({"run", study.path(), "--quiet"}).err == "");
}

TEST_CASE("--no-cost takes no times, even those that the machine has no GPU for") {
  const Study study(std::string(kMethods) + "[cost]\ntime = true\n");
  CHECK(run_lacuna({"run", study.path(), "--dry-run"}).says("needs a GPU"));
  CHECK(run_lacuna({"run", study.path(), "--dry-run", "--no-cost"}).code == 0);
}

TEST_CASE("two runs with one seed differ in times alone") {
  const Study study(kMethods);
  const std::string a = study.directory.file("a.json"), b = study.directory.file("b.json");
  const Outcome first = run_lacuna({"run", study.path(), "--json", a}, "OMP_NUM_THREADS=1 ");
  const Outcome second = run_lacuna({"run", study.path(), "--json", b}, "OMP_NUM_THREADS=2 ");
  REQUIRE(first.code == 0);
  CHECK(first.out.substr(first.out.find("- run:")) == second.out.substr(second.out.find("- run:")));
  Json one = Json::parse(read_bytes(a)), two = Json::parse(read_bytes(b));
  CHECK(one["schema"] == 1);
  const std::size_t rows = one["rows"].size();
  CHECK(drop_times(one) == rows);
  CHECK(drop_times(two) == rows);
  // The header says how many threads there are.
  one["header"].erase("device");
  two["header"].erase("device");
  CHECK(one.dump() == two.dump());
  for (const char* clock : {"second", "time", "date"}) CHECK_FALSE(has_key(one, clock));

  const std::string c = study.directory.file("c.json");
  REQUIRE(run_lacuna({"run", study.path(), "--json", c, "--seed", "1"}).code == 0);
  CHECK(read_bytes(c).find("\"seed\": 1") != std::string::npos);
  const auto mass_of_random = [](const Json& report) {
    for (const Json& table : report["tables"])
      for (const Json& line : table["lines"])
        if (table["phase"] == "decode" && line["label"] == "random")
          return line["metrics"]["mass_kept"]["mean"].get<double>();
    return 0.0;
  };
  CHECK(mass_of_random(one) != mass_of_random(Json::parse(read_bytes(c))));
}

TEST_CASE("the JSON holds cells, rows and tables") {
  const Study study(kMethods);
  const std::string path = study.directory.file("a.json");
  REQUIRE(run_lacuna({"run", study.path(), "--json", path, "--density", "0.5"}).code == 0);
  const Json report = Json::parse(read_bytes(path));
  CHECK(report["cells"].size() == 6);
  CHECK(report["cells"][3]["select"]["density"] == 0.5);
  CHECK(report["header"]["strategies"]["quest"]["id"].get<std::string>().size() == 16);
  // Prefill and decode: dense, oracle, random and the noise floor; decode has quest and what was evicted too; evict:
  // two and the floor.
  CHECK(report["rows"].size() == 2 * (4 + 7 + 3));
  for (const Json& row : report["rows"]) {
    const Json& mass = row["metrics"]["mass_kept"];
    CHECK(mass["mean"] > 0);
    CHECK(mass["queries"] > 0);
    CHECK(row["realised_head"] <= 1);
  }
  for (const Json& table : report["tables"])
    for (const Json& line : table["lines"]) {
      CHECK(line["realised"]["sparse_layers"]["head"] == line["realised"]["all_layers"]["head"]);
      CHECK(line["layers"] == Json::array({9, 27}));
    }
  CHECK(report["skips"].size() > 0);
}

TEST_CASE("what fails leaves the others alone") {
  const Study study(
      "budget.density = 0.5\n"
      "[[strategy]]\nselect = [\"oracle_topk\", \"throws_in_plan\", \"throws_in_index\", \"throws_in_score\", "
      "\"throws_in_mark\", "
      "\"returns_nan\", \"returns_foreign_indices\"]\n"
      "[[strategy]]\nselect = { name = \"throws_in_refine\", base = \"quest\" }\n"
      "[[strategy]]\nevict = [\"snapkv\", \"throws_in_score\", \"throws_in_attended\", \"throws_in_retain\", "
      "\"returns_nan\", "
      "\"keeps_foreign_tokens\"]\n"
      "[[strategy]]\nevict = \"snapkv\"\nallocate = [\"throws_in_allocate_rows\", \"throws_in_allocate_layers\"]\n");
  const std::string json = study.directory.file("a.json");
  for (const char* check : {"--quiet", "--check"}) {
    const Outcome o = run_lacuna({"--plugin-dir", LACUNA_FAULTY_PLUGINS, "run", study.path(), "--json", json, check});
    INFO(o.err);
    CHECK(o.code == 1);
    CHECK(o.says("rows failed"));
    for (const char* part :
         {"## Failed", "role plan: plan gave up", "role index: index gave up",
          "role score: an exception that is not a std::exception", "role mark: mark gave up",
          "role refine: refine gave up", "role attended: attended gave up", "role retain: retain gave up",
          "role allocate_rows: rows gave up", "role allocate_layers: layers gave up", "'returns_nan', role score",
          "found NaN", "'returns_foreign_indices', role mark", "'keeps_foreign_tokens', role retain", "found 1048576"})
      CHECK_MESSAGE(o.prints(part), std::string(part));
    const Json report = Json::parse(read_bytes(json));
    std::set<std::string> compared;
    for (const Json& table : report["tables"])
      for (const Json& line : table["lines"]) compared.insert(line["label"].get<std::string>());
    CHECK(compared == std::set<std::string>{"oracle_topk", "snapkv", "snapkv (evict)"});
    for (const Json& row : report["rows"]) CHECK((row["status"] == "failed") == row["error"].is_string());
  }
}

TEST_CASE("--dry-run counts and runs nothing") {
  const Study study(kMethods);
  const Outcome o = run_lacuna({"run", study.path(), "--dry-run", "--density", "0.5", "--set", "select.page_size=32"});
  INFO(o.err);
  CHECK(o.code == 0);
  CHECK(o.prints("\"page_size\":32"));
  // Rows of cells: the noise floor is none.
  CHECK(o.prints("6 cells, 1 traces, 22 rows"));
  CHECK(o.err == "");
}

TEST_CASE("Ctrl-C ends the run after the row at work") {
  const Study study(
      "budget.density = [0.2, 0.3, 0.4, 0.5, 0.6]\nrun.seed = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, "
      "16, 17, 18, 19]\n[[strategy]]\nselect = "
      "\"random\"\n");
  // The signal must come after start-up and before the end, whose times depend on the machine and on sanitizers.
  Outcome o;
  for (const char* seconds : {"0.3", "1", "3", "9"}) {
    o = run_lacuna({"run", study.path()}, std::string("timeout --preserve-status -s INT ") + seconds + " ");
    if (o.says("lacuna: interrupted")) break;
  }
  INFO(o.err);
  CHECK(o.code == 1);
  CHECK(o.says("lacuna: interrupted"));
  CHECK(o.prints("- interrupted: "));
}
