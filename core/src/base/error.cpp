#include "lacuna/base/error.hpp"

#include <algorithm>
#include <cctype>
#include <utility>

namespace lacuna {
namespace {

std::string compose(const Problem& p) {
  std::string text = p.what;
  if (!p.expected.empty()) text += ": expected " + p.expected;
  if (!p.found.empty()) text += (p.expected.empty() ? ": found " : ", found ") + p.found;
  if (!p.where.empty()) text += " (" + p.where + ")";
  if (!p.remedy.empty()) text += ". " + p.remedy;
  return text;
}

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours cost 1 each.
std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> before, previous(b.size() + 1), current(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) previous[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    current[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      current[j] = std::min({previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        current[j] = std::min(current[j], before[j - 2] + 1);
      }
    }
    before = previous;
    std::swap(previous, current);
  }
  return previous[b.size()];
}

}  // namespace

Error::Error(Problem problem) : std::runtime_error(compose(problem)), problem_(std::move(problem)) {}

std::vector<std::string> nearest(const std::string& name, const std::vector<std::string>& known) {
  constexpr std::size_t kMost = 3, kShortestPrefix = 3;
  const std::string wanted = lower(name);
  std::vector<std::pair<std::size_t, std::string>> near;
  for (const std::string& candidate : known) {
    const std::string other = lower(candidate);
    std::size_t distance = edit_distance(wanted, other);
    const std::size_t shared = std::min(wanted.size(), other.size());
    const bool is_prefix = shared >= kShortestPrefix && wanted.compare(0, shared, other, 0, shared) == 0;
    if (is_prefix) distance = std::min<std::size_t>(distance, 2);  // "vertical" means vertical_slash
    if (distance <= std::max<std::size_t>(1, wanted.size() / 3) || is_prefix) near.emplace_back(distance, candidate);
  }
  std::sort(near.begin(), near.end());
  near.erase(std::unique(near.begin(), near.end()), near.end());
  std::vector<std::string> out;
  for (std::size_t i = 0; i < near.size() && i < kMost; ++i) out.push_back(near[i].second);
  return out;
}

std::string suggestion(const std::string& name, const std::vector<std::string>& known) {
  const std::vector<std::string> near = nearest(name, known);
  if (!near.empty()) {
    std::string text = "did you mean ";
    for (std::size_t i = 0; i < near.size(); ++i) {
      if (i > 0) text += i + 1 == near.size() ? " or " : ", ";
      text += "'" + near[i] + "'";
    }
    return text + "?";
  }
  if (known.empty()) return "none is known";
  std::string text = "known: ";
  for (std::size_t i = 0; i < known.size(); ++i) text += (i ? ", " : "") + known[i];
  return text;
}

}  // namespace lacuna
