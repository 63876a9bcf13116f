#include "study/scenario_file.hpp"

using namespace lacuna;
using namespace lacuna::testing;

namespace {
const std::string kStrategy = "\n[[strategy]]\nselect = \"quest\"\n";

CostOptions cost(const std::string& text, const Overrides& overrides = {}) {
  return parse(text + kStrategy, overrides).cost;
}
std::string error(const std::string& text, const Overrides& overrides = {}) {
  return parse_error(text + kStrategy, overrides);
}
bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
}  // namespace

TEST_CASE("[cost]: times follow the device, and can be left out") {
  Overrides on_gpu, left_out;
  on_gpu.device = "cuda";
  left_out.device = "cuda";
  left_out.no_cost = true;
  CHECK_FALSE(cost("").wanted);
  CHECK(cost("", on_gpu).wanted);
  CHECK(cost("run.device = \"cuda\"").wanted);
  CHECK_FALSE(cost("cost.time = false", on_gpu).wanted);
  CHECK_FALSE(cost("cost.time = true", left_out).wanted);
  CHECK_FALSE(cost("cost.time = false").wanted);
  const std::string refused = error("cost.time = true");
  CHECK(holds(refused, "needs a GPU"));
  CHECK(holds(refused, "s.toml:2:"));
  CHECK(holds(refused, "--no-cost"));
  Overrides cpu_without;
  cpu_without.no_cost = true;
  CHECK(error("cost.time = true", cpu_without) == "");
}

TEST_CASE("[cost]: defaults, and every key") {
  const CostOptions plain = cost("run.phases = [\"decode\", \"prefill\"]");
  CHECK(plain.shape.num_qo_heads == 32);
  CHECK(plain.shape.num_kv_heads == 8);
  CHECK(plain.shape.head_dim == 128);
  CHECK(plain.shape.tokens == std::vector<sdk::i64>{32768});
  CHECK(plain.dtype == sdk::Dtype::bf16);
  CHECK(plain.phases == std::set<ReplayPhase>{ReplayPhase::prefill, ReplayPhase::decode});
  CHECK(plain.samples == 30);
  const CostOptions given = cost(
      "[cost]\nshape = { num_qo_heads = 28, num_kv_heads = 4, head_dim = 64, tokens = [4096, 131072] }\n"
      "dtype = \"f16\"\nphases = \"evict\"\nsamples = 99");
  CHECK(given.shape.num_qo_heads == 28);
  CHECK(given.shape.num_kv_heads == 4);
  CHECK(given.shape.head_dim == 64);
  CHECK(given.shape.tokens == std::vector<sdk::i64>{4096, 131072});
  CHECK(given.dtype == sdk::Dtype::f16);
  CHECK(given.phases == std::set<ReplayPhase>{ReplayPhase::evict});
  CHECK(given.samples == 99);
  CHECK(cost("cost.shape.tokens = 1024").shape.tokens == std::vector<sdk::i64>{1024});
}

TEST_CASE("[cost]: what is wrong is named with its place") {
  const auto refused = [](const std::string& text, const std::string& part, const std::string& nearest = "") {
    CAPTURE(text);
    const std::string e = error(text);
    CAPTURE(e);
    CHECK(holds(e, part));
    CHECK(holds(e, "s.toml:2:"));
    CHECK(holds(e, nearest));
  };
  refused("cost.tmie = true", "unknown key 'tmie'", "did you mean 'time'?");
  refused("cost.shape.head_dimm = 64", "unknown key 'head_dimm' in cost.shape", "did you mean 'head_dim'?");
  refused("cost.phases = [\"decod\"]", "unknown phase 'decod'", "did you mean 'decode'?");
  refused("cost.phases = []", "cost.phases", "one or more");
  refused("cost.time = 1", "cost.time", "true or false");
  refused("cost.samples = 29", "cost.samples", "30..");
  refused("cost.dtype = \"f32\"", "cost.dtype", "bf16 or f16");
  refused("cost.shape = 3", "cost.shape", "a table");
  refused("cost.shape = { num_qo_heads = 30 }", "cost.shape", "multiple of the KV heads");
  refused("cost.shape.head_dim = 63", "cost.shape.head_dim", "even");
  refused("cost.shape.tokens = [1]", "cost.shape.tokens", "2..");
  refused("cost.shape.tokens = []", "cost.shape.tokens", "at least one");
  refused("cost.shape.tokens = [64, 64]", "cost.shape.tokens", "different");
  refused("cost = 1", "wrong value of cost", "[cost]");
}
