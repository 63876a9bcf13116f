// lacuna check FILE...: the conformance suite on the strategies of libraries.
#include <fmt/format.h>

#include <filesystem>
#include <memory>

#include "command.hpp"
#include "lacuna/replay/conformance.hpp"

namespace lacuna::cli {
namespace {

int check(Session& session, const std::vector<std::string>& files, const std::string& device_name) {
  const std::shared_ptr<Device> device = device_by_name(device_name);
  Registry registry = session.registry();
  for (const std::string& file : files) registry.load(file);
  int failed = 0, passed = 0;
  for (const std::string& file : files) {
    const std::string library = std::filesystem::canonical(file).string();
    for (const StrategyType* type : registry.all()) {
      if (type->library() != library) continue;
      for (const Finding& f : check_strategy(registry, *type, device)) {
        fmt::print("{}  {}: {}{}\n", f.passed ? "pass" : "FAIL", f.strategy, f.rule,
                   f.detail.empty() ? "" : ": " + f.detail);
        ++(f.passed ? passed : failed);
      }
    }
  }
  fmt::print("{} passed, {} failed\n", passed, failed);
  return failed > 0 ? 1 : 0;
}

}  // namespace

void add_check(CLI::App& app, Session& session) {
  CLI::App* command = app.add_subcommand("check", "loads plug-ins and runs the conformance suite on their strategies");
  auto files = std::make_shared<std::vector<std::string>>();
  command->add_option("files", *files, "shared libraries")->required();
  auto device = std::make_shared<std::string>("cpu");
  command->add_option("--device", *device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  command->callback([&session, files, device] { session.exit_code = check(session, *files, *device); });
}

}  // namespace lacuna::cli
