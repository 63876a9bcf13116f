// Runs the built `lacuna` and keeps what it says.
#pragma once

#include <sys/wait.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cli/small_trace.hpp"

namespace lacuna::testing {

struct Outcome {
  int code = -1;  // exit code; -1: ended by a signal
  std::string out, err;

  bool says(const std::string& text) const { return err.find(text) != std::string::npos; }
  bool prints(const std::string& text) const { return out.find(text) != std::string::npos; }
};

/// `prefix` goes before the command ("LACUNA_PLUGIN_PATH=... "). Arguments hold no quotes.
inline Outcome run_lacuna(const std::vector<std::string>& arguments, const std::string& prefix = "") {
  const ScratchDirectory scratch;
  std::string line = prefix + "'" LACUNA_CLI "'";
  for (const std::string& a : arguments) line += " '" + a + "'";
  line += " >'" + scratch.file("out") + "' 2>'" + scratch.file("err") + "'";
  const int status = std::system(line.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_bytes(scratch.file("out")),
          read_bytes(scratch.file("err"))};
}

/// Bad usage or input: exit code 2, nothing on stdout, one line on stderr that holds every part.
inline void check_refused(const Outcome& o, const std::vector<std::string>& parts) {
  INFO("stderr: ", o.err);
  CHECK(o.code == 2);
  CHECK(o.out == "");
  CHECK(o.err.rfind("lacuna: ", 0) == 0);
  CHECK(o.err.find('\n') == o.err.size() - 1);
  for (const std::string& part : parts) {
    CAPTURE(part);
    CHECK(o.says(part));
  }
}

}  // namespace lacuna::testing
