// The commands of `lacuna`, one file each. A command returns its exit code: 0 fine, 1 some cells failed; what throws is
// bad usage or input, 2.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "lacuna/strategy/registry.hpp"

namespace lacuna::cli {

/// What the global options say, and the exit code of the command that ran.
struct Session {
  std::vector<std::string> plugin_dirs;
  int exit_code = 0;

  /// The strategies of the standard places; libraries that could not be loaded are named on stderr.
  Registry registry() const;
};

/// A message on stderr, one line.
void note(const std::string& text);

/// The strategy's roles in a study: "select, evict", "allocate", "select wrapper".
std::string kind_of(const StrategyType& type);
/// "prefill, decode, evict".
std::vector<std::string> phases_of(const StrategyType& type);

void add_run(CLI::App& app, Session& session);
void add_list(CLI::App& app, Session& session);
void add_describe(CLI::App& app, Session& session);
void add_trace(CLI::App& app, Session& session);
void add_dump(CLI::App& app, Session& session);
void add_calibrate(CLI::App& app, Session& session);
void add_check(CLI::App& app, Session& session);

}  // namespace lacuna::cli
