#include "lacuna/base/write_text.hpp"

#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "lacuna/base/error.hpp"

namespace lacuna {

void write_text(const std::string& text, const std::string& path, const std::string& what) {
  const std::string beside = path + ".part" + std::to_string(getpid());
  {
    std::ofstream out(beside, std::ios::binary | std::ios::trunc);
    out << text;
    out.close();
    std::error_code failed;
    if (out) std::filesystem::rename(beside, path, failed);
    if (out && !failed) return;
  }
  std::error_code ignored;
  std::filesystem::remove(beside, ignored);
  throw Error({"cannot write " + what, "a file in a directory that exists and can be written", "", path,
               "Check the path and the space left."});
}

}  // namespace lacuna
