#include "study/cost.hpp"

#include <algorithm>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

constexpr std::int64_t kMostTokens = 1 << 20, kLeastSamples = 30, kMostSamples = 10'000;

class CostReader {
 public:
  explicit CostReader(const TomlDocument& document) : document_(document) {}

  CostOptions read(const std::set<ReplayPhase>& run_phases) {
    CostOptions out;
    const Json table = document_.root.value("cost", Json::object());
    if (!table.is_object()) refuse("cost", "a table, [cost]", table);
    check_keys(table, "cost", {"time", "shape", "dtype", "phases", "samples"});
    if (table.contains("shape")) out.shape = shape(table["shape"]);
    if (table.contains("dtype")) out.dtype = dtype(table["dtype"]);
    out.phases = table.contains("phases") ? phases(table["phases"]) : run_phases;
    if (table.contains("samples"))
      out.samples = static_cast<int>(whole(table["samples"], "cost.samples", kLeastSamples, kMostSamples));
    return out;
  }

  std::optional<bool> time() const {
    const Json table = document_.root.value("cost", Json::object());
    if (!table.contains("time")) return std::nullopt;
    if (!table["time"].is_boolean()) refuse("cost.time", "true or false", table["time"]);
    return table["time"].get<bool>();
  }

 private:
  [[noreturn]] void refuse(const std::string& key, const std::string& expected, const Json& found) const {
    throw Error({"wrong value of " + key, expected, found.dump(), document_.where(key), ""});
  }
  void check_keys(const Json& table, const std::string& path, const std::vector<std::string>& known) const {
    for (const auto& [key, value] : table.items())
      if (std::find(known.begin(), known.end(), key) == known.end())
        throw Error({"unknown key '" + key + "' in " + path, "", "", document_.where(path + "." + key),
                     suggestion(key, known)});
  }
  std::int64_t whole(const Json& value, const std::string& key, std::int64_t least, std::int64_t most) const {
    if (!value.is_number_integer() || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
      refuse(key, "a whole number in " + std::to_string(least) + ".." + std::to_string(most), value);
    return value.get<std::int64_t>();
  }

  CostShape shape(const Json& table) const {
    if (!table.is_object()) refuse("cost.shape", "a table: { num_qo_heads, num_kv_heads, head_dim, tokens }", table);
    check_keys(table, "cost.shape", {"num_qo_heads", "num_kv_heads", "head_dim", "tokens"});
    CostShape out;
    const auto number = [&](const char* key, sdk::i32& to, std::int64_t most) {
      if (table.contains(key)) to = static_cast<sdk::i32>(whole(table[key], std::string("cost.shape.") + key, 1, most));
    };
    number("num_qo_heads", out.num_qo_heads, 1024);
    number("num_kv_heads", out.num_kv_heads, 1024);
    number("head_dim", out.head_dim, 1024);
    if (out.num_qo_heads % out.num_kv_heads != 0)
      refuse("cost.shape", "query heads that are a multiple of the KV heads", table);
    if (out.head_dim % 2 != 0) refuse("cost.shape.head_dim", "an even number", table["head_dim"]);
    if (!table.contains("tokens")) return out;
    const Json& tokens = table["tokens"];
    out.tokens.clear();
    for (const Json& t : tokens.is_array() ? tokens : Json::array({tokens})) {
      out.tokens.push_back(whole(t, "cost.shape.tokens", 2, kMostTokens));
      if (std::count(out.tokens.begin(), out.tokens.end(), out.tokens.back()) > 1)
        refuse("cost.shape.tokens", "different lengths", tokens);
    }
    if (out.tokens.empty()) refuse("cost.shape.tokens", "at least one length", tokens);
    return out;
  }

  sdk::Dtype dtype(const Json& value) const {
    if (value == "bf16") return sdk::Dtype::bf16;
    if (value == "f16") return sdk::Dtype::f16;
    refuse("cost.dtype", "bf16 or f16", value);
  }

  std::set<ReplayPhase> phases(const Json& value) const {
    std::set<ReplayPhase> out;
    for (const Json& p : value.is_array() ? value : Json::array({value})) {
      std::vector<std::string> names;
      for (const ReplayPhase phase : {ReplayPhase::prefill, ReplayPhase::evict, ReplayPhase::decode}) {
        names.emplace_back(name_of(phase));
        if (p == names.back()) out.insert(phase);
      }
      if (!p.is_string()) refuse("cost.phases", "prefill, evict or decode", p);
      const auto name = p.get<std::string>();
      if (std::find(names.begin(), names.end(), name) == names.end())
        throw Error({"unknown phase '" + name + "'", "", "", document_.where("cost.phases"), suggestion(name, names)});
    }
    if (out.empty()) refuse("cost.phases", "one or more of prefill, evict, decode", value);
    return out;
  }

  const TomlDocument& document_;
};

}  // namespace

CostOptions read_cost(const TomlDocument& document, const std::set<ReplayPhase>& run_phases, bool on_gpu, bool skip) {
  CostReader reader(document);
  CostOptions out = reader.read(run_phases);
  const std::optional<bool> time = reader.time();
  out.wanted = !skip && time.value_or(on_gpu);
  if (out.wanted && !on_gpu)
    throw Error({"[cost] time = true needs a GPU: the times are a GPU's", "device = \"cuda\"", "device = \"cpu\"",
                 document.where("cost.time"), "Leave time out (it follows the device), or run with --no-cost."});
  return out;
}

}  // namespace lacuna
