// Real queries, keys and values: the shipped trace, and those of LACUNA_TRACE_DIR.
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "attention/bound.hpp"
#include "attention/trace_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

void check_layer(const Trace& trace, int index) {
  const TraceLayer layer(trace, index);
  const i64 tokens = trace.info().tokens();
  // Enough queries for full tiles, the start of the prompt, and one alone.
  for (const auto& [first, count] : {std::pair<i64, i64>{0, 70}, {tokens - 130, 130}, {tokens - 1, 1}}) {
    CAPTURE(index);
    CAPTURE(first);
    const PagedFixture cache = layer.cache(first + count);
    Attention a{layer.layer, cache.view(), layer.queries(first, count)};
    const Reference r = oracle(a);
    CHECK(worst_excess(run(a), r, layer.layer.head_dim) <= 1.);
    for (i64 head = 0; head < a.q.heads; ++head) CHECK(worst_excess_of_query(a, run(a), 0, head, count - 1) <= 1.);
    if (a.layer.sliding_window > 0) continue;

    const sdk::Rows rows = rows_of(1, layer.layer.num_qo_heads, true, 64, count, first);
    std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
    for (std::size_t n = 0; n < content.size(); ++n) {
      for (i64 p = static_cast<i64>(n % 40); p < first + count; p += 300)
        content[n].pieces.push_back(static_cast<i32>(p));
      content[n].sinks = 4;
      content[n].window = 64;
    }
    const SelectionFixture selection(rows, 64, content);
    a.read = &selection.selection;
    CHECK(worst_excess(run(a), oracle(a), layer.layer.head_dim) <= 1.);
  }
}

}  // namespace

TEST_CASE("attention meets the bound on the shipped trace") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  for (const int layer : trace.info().captured_layers) check_layer(trace, layer);
}

TEST_CASE("attention meets the bound on further traces") {
  const char* directory = std::getenv("LACUNA_TRACE_DIR");
  if (!directory) {
    MESSAGE("LACUNA_TRACE_DIR is not set: skipped");
    return;
  }
  for (const auto& file : std::filesystem::directory_iterator(directory)) {
    const std::string path = file.path().string();
    if (file.path().extension() != ".safetensors" ||
        (path.find("qwen") == std::string::npos && path.find("gemma") == std::string::npos))
      continue;
    CAPTURE(path);
    const Trace trace = Trace::open(path);
    check_layer(trace, trace.info().captured_layers.front());
  }
}
