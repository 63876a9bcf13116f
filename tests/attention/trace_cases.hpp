// Real queries, keys and values on any device (a Side of cases.hpp): the shipped trace, and those of LACUNA_TRACE_DIR.
// Side::kShippedQueries, kFurtherQueries: most queries of a call.
#pragma once

#include <cstdlib>
#include <filesystem>

#include "attention/cases.hpp"
#include "attention/trace_fixture.hpp"

namespace lacuna::test {

/// The first queries, the last `most` and the very last, each read densely and sparsely.
template <class Side>
void check_trace(const Trace& trace, i64 most) {
  for (const int index : trace.info().captured_layers) {
    const TraceLayer layer(trace, index);
    const i64 tokens = trace.info().tokens(), last = std::min(tokens, most);
    for (const auto& [first, count] : {std::pair<i64, i64>{0, 70}, {tokens - last, last}, {tokens - 1, 1}}) {
      CAPTURE(index);
      CAPTURE(first);
      const PagedFixture cache = layer.cache(first + count);
      Attention a{layer.layer, cache.view(), layer.queries(first, count)};
      check_call<Side>(a);
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
        check_call<Side>(a);
      }
    }
  }
}

TEST_CASE_TEMPLATE_DEFINE("attention meets the bound on the shipped trace", Side, attention_shipped_trace) {
  check_trace<Side>(Trace::open(LACUNA_SOURCE_DIR "/scenarios/data/smollm2-needles-2k.safetensors"),
                    Side::kShippedQueries);
}

TEST_CASE_TEMPLATE_DEFINE("attention meets the bound on further traces", Side, attention_further_traces) {
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
    check_trace<Side>(Trace::open(path), Side::kFurtherQueries);
  }
}

}  // namespace lacuna::test
