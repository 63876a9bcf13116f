// Errors that a person can act on: what was wrong, what was expected, what was found, where, and what to do.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace lacuna {

struct Problem {
  std::string what;      // one clause, no full stop
  std::string expected;  // each of these may be empty
  std::string found;
  std::string where;  // file, tensor, line:column, strategy and role
  std::string remedy;
};

/// Bad usage, input or plug-in. what() is the one-paragraph text made from the problem.
class Error : public std::runtime_error {
 public:
  explicit Error(Problem problem);
  const Problem& problem() const { return problem_; }

 private:
  Problem problem_;
};

/// The names nearest to `name` by edit distance (at most three, nearest first), for "did you mean".
std::vector<std::string> nearest(const std::string& name, const std::vector<std::string>& known);

/// "did you mean 'a' or 'b'?" or, when nothing is near, "known: a, b, c".
std::string suggestion(const std::string& name, const std::vector<std::string>& known);

}  // namespace lacuna
