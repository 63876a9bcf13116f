#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "command.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/build_info.hpp"

namespace lacuna::cli {

void note(const std::string& text) { fmt::print(stderr, "lacuna: {}\n", text); }

Registry Session::registry() const {
  Registry out;
  out.load_standard(plugin_dirs);
  for (const std::string& failure : out.failures()) note("warning: " + failure);
  return out;
}

namespace {

constexpr int kBadUsage = 2;

/// CLI11 knows that an argument is too many, not that it was meant as a command.
std::string usage_error(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv) {
  std::vector<std::string> commands;
  for (const CLI::App* command : app.get_subcommands({})) commands.push_back(command->get_name());
  if (argc < 2) return "no command. " + suggestion("", commands);
  const std::string first = argv[1];
  const bool is_command = std::find(commands.begin(), commands.end(), first) != commands.end();
  if (!is_command && first.front() != '-')
    return fmt::format("unknown command '{}'. {}", first, suggestion(first, commands));
  const auto chosen = app.get_subcommands();
  const std::string help = chosen.empty() ? "lacuna --help" : "lacuna " + chosen.front()->get_name() + " --help";
  return fmt::format("{}. See `{}`.", error.what(), help);
}

int run_command(int argc, char** argv) {
  CLI::App app{"Lacuna: replays recorded attention under sparse-attention strategies and measures what is lost.",
               "lacuna"};
  Session session;
  app.set_version_flag("--version", fmt::format("lacuna {} ({})", build_info::kVersion, build_info::kCommit));
  app.add_option("--plugin-dir", session.plugin_dirs, "directory with more strategies, *.so; may be repeated")
      ->allow_extra_args(false);
  app.require_subcommand(1);
  app.fallthrough();
  for (const auto add : {add_run, add_list, add_describe, add_trace, add_dump, add_calibrate, add_check})
    add(app, session);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    note(usage_error(app, e, argc, argv));
    return kBadUsage;
  }
  if (std::fflush(stdout) != 0)
    throw Error({"cannot write to standard output", "", "", "", "Check the space left, or the program that reads it."});
  return session.exit_code;
}

}  // namespace
}  // namespace lacuna::cli

/// OpenMP threads spin between loops by default; on a machine that does anything else too, that slows a replay several
/// times over (69 s against 8 s, measured with two other compilers at work). The runtime reads its settings before
/// main, so the program starts itself again with the setting, once.
void wait_passively(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY")) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", argv);  // returns only when it failed, and then the program goes on as it is
}

int main(int argc, char** argv) {
  wait_passively(argv);
  try {
    return lacuna::cli::run_command(argc, argv);
  } catch (const std::exception& e) {
    lacuna::cli::note(e.what());
    return lacuna::cli::kBadUsage;
  }
}
