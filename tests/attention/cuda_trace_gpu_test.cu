// Real queries, keys and values on the GPU: every layer of the shipped trace, and those of LACUNA_TRACE_DIR.
#include <cstdlib>
#include <filesystem>

#include "attention/device_attention.hpp"
#include "attention/trace_fixture.hpp"

using namespace lacuna;
using namespace lacuna::test;

namespace {

/// Worst error over the whole prompt, the first queries and the last one, each read densely and sparsely.
void check_layer(const Trace& trace, int index, i64 most_queries) {
  const TraceLayer layer(trace, index);
  const i64 tokens = trace.info().tokens(), last = std::min(tokens, most_queries);
  for (const auto& [first, count] : {std::pair<i64, i64>{0, 70}, {tokens - last, last}, {tokens - 1, 1}}) {
    CAPTURE(index);
    CAPTURE(first);
    const PagedFixture cache = layer.cache(first + count);
    Attention a{layer.layer, cache.view(), layer.queries(first, count)};
    CHECK(worst_error(a) <= 1.);
    if (a.layer.sliding_window > 0) continue;
    for (const bool per_query_head : {false, true}) {
      const sdk::Rows rows = rows_of(1, per_query_head ? layer.layer.num_qo_heads : layer.layer.num_kv_heads,
                                     per_query_head, 64, count, first);
      std::vector<SelectionFixture::Row> content(static_cast<std::size_t>(rows.count()));
      for (std::size_t n = 0; n < content.size(); ++n) {
        for (i64 p = static_cast<i64>(n % 40); p < first + count; p += 300)
          content[n].pieces.push_back(static_cast<i32>(p));
        content[n].sinks = 4;
        content[n].window = 64;
      }
      const SelectionFixture selection(rows, 64, content);
      a.read = &selection.selection;
      CHECK(worst_error(a) <= 1.);
    }
    a.read = nullptr;
  }
}

}  // namespace

TEST_CASE("GPU attention meets the bound on the shipped trace") {
  const Trace trace = Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors");
  for (const int layer : trace.info().captured_layers) check_layer(trace, layer, trace.info().tokens());
}

TEST_CASE("GPU attention meets the bound on further traces") {
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
    for (const int layer : trace.info().captured_layers) check_layer(trace, layer, 300);
  }
}
