// lacuna trace FILE: what a trace holds.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

#include "command.hpp"
#include "lacuna/replay/trace_summary.hpp"

namespace lacuna::cli {
namespace {

void print_trace(const std::string& path) {
  const Trace trace = Trace::open(path);
  const TraceInfo& info = trace.info();
  fmt::print("file      {}\nid        {}\nmodel     {}\n", path, trace.content_id(), info.model);
  fmt::print("layers    {} of {}\n", fmt::join(info.captured_layers, ", "), info.num_layers);
  fmt::print("heads     {} query, {} KV, head_dim {}\n", info.num_qo_heads, info.num_kv_heads, info.head_dim);
  fmt::print("tokens    {} = {} prefill + {} decode\n", info.tokens(), info.prefill_tokens, info.decode_tokens);
  for (const auto& [key, value] : info.provenance) fmt::print("{:<9} {}\n", key, value);
  fmt::print("\nsegments\n");
  for (const Segment& s : info.segments)
    fmt::print("  {:<9} {}..{} ({} tokens)\n", s.name, s.begin, s.end, s.end - s.begin);
  if (info.segments.empty()) fmt::print("  none\n");
  fmt::print("\n| layer | window | entropy (nat) | sink mass | recent mass | max logit | W_O |\n");
  fmt::print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |\n");
  for (const int layer : info.captured_layers) {
    const LayerSummary s = summarize_layer(trace, layer);
    const auto window = info.layer(layer).sliding_window;
    fmt::print("| {} | {} | {:.3f} | {:.4f} | {:.4f} | {:.2f} | {} |\n", layer,
               window > 0 ? std::to_string(window) : "–", s.entropy, s.sink_mass, s.recent_mass, s.max_logit,
               trace.layer(layer).wo.present() ? "yes" : "no");
  }
  fmt::print(
      "\nentropy: mean over heads and prompt queries; sink mass: on the first 4 tokens, recent mass: on the 64 newest, "
      "of queries that see more than 64.\n");
}

}  // namespace

void add_trace(CLI::App& app, Session&) {
  CLI::App* command = app.add_subcommand("trace", "what a trace holds: geometry, segments, statistics of each layer");
  auto path = std::make_shared<std::string>();
  command->add_option("file", *path, "a trace (.safetensors)")->required();
  command->callback([path] { print_trace(*path); });
}

}  // namespace lacuna::cli
