#include "lacuna/strategy/registry.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <boost/dll/runtime_symbol_info.hpp>
#include <boost/dll/shared_library.hpp>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <utility>

#include "descriptor.hpp"
#include "lacuna/base/error.hpp"
#include "lacuna/strategy/library_id.hpp"

namespace lacuna {
namespace {

namespace fs = std::filesystem;
using boost::dll::shared_library;

constexpr const char* kSymbol = "lacuna_plugin";

std::string canonical_library(const std::string& library) {
  std::error_code ignored;
  if (!fs::exists(library, ignored)) {
    throw Error(
        {"no such plug-in", "a shared library", "no file", library, "Check the path, or build the plug-in first."});
  }
  if (!fs::is_regular_file(library, ignored)) {
    throw Error({"not a plug-in", "a shared library",
                 fs::is_directory(library, ignored) ? "a directory" : "no regular file", library, ""});
  }
  return fs::canonical(library).string();
}

/// dlerror's own words out of Boost.DLL's message.
std::string loader_reason(const std::string& message) {
  const std::string marker = "dlerror system message: ";
  const auto begin = message.find(marker), end = message.rfind(')');
  if (begin == std::string::npos || end == std::string::npos || end < begin + marker.size()) return message;
  return message.substr(begin + marker.size(), end - begin - marker.size());
}

/// Opens a library for the rest of the process: strategies and their threads point into it.
const shared_library& open_for_good(const std::string& path) {
  static auto& open = *new std::vector<std::unique_ptr<shared_library>>;
  try {
    using namespace boost::dll::load_mode;
    open.push_back(std::make_unique<shared_library>(fs::path(path), rtld_now | rtld_local));
  } catch (const std::system_error& e) {
    throw Error({"the plug-in cannot be loaded", "every symbol in the plug-in or in the libraries it links",
                 loader_reason(e.what()), path,
                 "Link what it uses; the SDK itself is header-only and needs nothing from Lacuna."});
  }
  return *open.back();
}

/// The descriptor behind the alias. The pointer is followed only if it leads back into the library, since another
/// program's symbol of this name may be anything.
const sdk::Descriptor& find_descriptor(const shared_library& library, const std::string& path) {
  if (!library.has(kSymbol)) {
    throw Error({"not a Lacuna plug-in", fmt::format("the exported symbol '{}'", kSymbol), "none", path,
                 "End the plug-in's source with LACUNA_PLUGIN(YourStrategy)."});
  }
  const void* const& alias = library.get<const void*>(kSymbol);
  Dl_info symbol{}, target{};
  if (!dladdr(&alias, &symbol) || !dladdr(alias, &target) || symbol.dli_fbase != target.dli_fbase) {
    throw Error({"not a Lacuna plug-in", fmt::format("'{}' to be an alias of a descriptor", kSymbol), "something else",
                 path, "Export it with LACUNA_PLUGIN(...)."});
  }
  return *static_cast<const sdk::Descriptor*>(alias);
}

std::vector<std::string> split(const std::string& paths) {
  std::vector<std::string> out;
  for (std::size_t begin = 0; begin <= paths.size();) {
    const auto end = std::min(paths.find(':', begin), paths.size());
    if (end > begin) out.push_back(paths.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

}  // namespace

void Registry::load(const std::string& library) {
  const std::string path = canonical_library(library);
  if (std::find(loaded_.begin(), loaded_.end(), path) != loaded_.end()) return;
  const std::string id = library_id(path);
  const sdk::Descriptor& descriptor = find_descriptor(open_for_good(path), path);
  check_descriptor(descriptor, path);
  std::vector<std::unique_ptr<StrategyType>> added;
  for (int i = 0; i < descriptor.num_entries; ++i) {
    const sdk::Entry entry = whole_entry(*descriptor.entries[i], descriptor.abi_minor);
    check_entry(entry, path);
    for (const auto* others : {&types_, &added}) {
      for (const auto& other : *others) {
        if (other->name() != entry.name) continue;
        throw Error({fmt::format("strategy '{}' is there already", entry.name), "a name of its own",
                     others == &added ? "the same name twice in one plug-in" : "one from " + other->library(), path,
                     "Rename it, or leave one of the libraries out."});
      }
    }
    added.push_back(std::make_unique<StrategyType>(entry, path, id));
  }
  std::move(added.begin(), added.end(), std::back_inserter(types_));
  loaded_.push_back(path);
}

void Registry::load_directory(const std::string& directory) {
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored)) {
    throw Error({"no such plug-in directory", "a directory of *.so files",
                 fs::exists(directory, ignored) ? "a file" : "nothing", directory,
                 "Check --plugin-dir and LACUNA_PLUGIN_PATH."});
  }
  std::vector<std::string> libraries;
  std::error_code unreadable;
  for (const auto& file : fs::directory_iterator(directory, unreadable)) {
    if (file.path().extension() == ".so") libraries.push_back(file.path().string());
  }
  if (unreadable) throw Error({"the plug-in directory cannot be read", "", unreadable.message(), directory, ""});
  std::sort(libraries.begin(), libraries.end());
  for (const auto& library : libraries) {
    try {
      load(library);
    } catch (const Error& e) {
      failures_.emplace_back(e.what());
    }
  }
}

void Registry::load_standard(const std::vector<std::string>& directories) {
  for (const auto& directory : directories) load_directory(directory);
  if (const char* paths = std::getenv("LACUNA_PLUGIN_PATH")) {
    for (const auto& directory : split(paths)) {
      try {
        load_directory(directory);
      } catch (const Error& e) {
        failures_.emplace_back(e.what());
      }
    }
  }
  for (const fs::path& code : {boost::dll::this_line_location(), boost::dll::program_location()}) {
    const fs::path home = fs::weakly_canonical(code).parent_path();
    for (const char* beside : {"lacuna/plugins", "plugins", "../lib/lacuna/plugins", "../plugins"}) {
      if (fs::is_directory(home / beside)) return load_directory((home / beside).lexically_normal().string());
    }
  }
}

const StrategyType& Registry::find(const std::string& name) const {
  std::vector<std::string> known;
  for (const auto& type : types_) {
    if (type->name() == name) return *type;
    known.push_back(type->name());
  }
  std::sort(known.begin(), known.end());
  std::string remedy = suggestion(name, known);
  for (const auto& failure : failures_) {
    if (failure.find(name) != std::string::npos) remedy += fmt::format(" A library was not loaded: {}", failure);
  }
  throw Error({fmt::format("unknown strategy '{}'", name), "the name of a loaded strategy", "", "", remedy});
}

std::vector<const StrategyType*> Registry::all() const {
  std::vector<const StrategyType*> out;
  for (const auto& type : types_) out.push_back(type.get());
  std::sort(out.begin(), out.end(), [](const auto* a, const auto* b) { return a->name() < b->name(); });
  return out;
}

}  // namespace lacuna
