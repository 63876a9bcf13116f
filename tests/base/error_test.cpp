#include "lacuna/base/error.hpp"

#include <doctest/doctest.h>

using lacuna::Error;
using lacuna::nearest;
using lacuna::suggestion;

TEST_CASE("an error's text leaves out what is not there") {
  CHECK(std::string(Error({"bad k", "8", "9", "a.toml:3:1", "Use 8."}).what()) ==
        "bad k: expected 8, found 9 (a.toml:3:1). Use 8.");
  CHECK(std::string(Error({"bad k", "8", "", "", ""}).what()) == "bad k: expected 8");
  CHECK(std::string(Error({"bad k", "", "9", "", "Use 8."}).what()) == "bad k: found 9. Use 8.");
  CHECK(std::string(Error({"bad k", "", "", "here", ""}).what()) == "bad k (here)");
  CHECK(std::string(Error({"bad k", "", "", "", ""}).what()) == "bad k");
}

TEST_CASE("nearest names: by edits, swaps, case and prefix, at most three, nearest first") {
  const std::vector<std::string> known = {"quest", "snapkv", "h2o", "vertical_slash", "block_topk", "xattention"};
  CHECK(nearest("qeust", known) == std::vector<std::string>{"quest"});
  CHECK(nearest("Quest", known) == std::vector<std::string>{"quest"});
  CHECK(nearest("snap-kv", known) == std::vector<std::string>{"snapkv"});
  CHECK(nearest("vertical", known) == std::vector<std::string>{"vertical_slash"});
  CHECK(nearest("zzz", known).empty());
  CHECK(nearest("", known).empty());
  CHECK(nearest("abcd", {"abxx", "abcx", "abce", "abcf", "abcd"}) == std::vector<std::string>{"abcd", "abce", "abcf"});
}

TEST_CASE("a suggestion names what is near, or all there is") {
  CHECK(suggestion("qust", {"quest", "dense"}) == "did you mean 'quest'?");
  CHECK(suggestion("aab", {"aaa", "aac"}) == "did you mean 'aaa' or 'aac'?");
  CHECK(suggestion("zzz", {"quest", "dense"}) == "known: quest, dense");
  CHECK(suggestion("zzz", {}) == "none is known");
}
