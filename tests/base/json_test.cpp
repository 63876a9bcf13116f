#include "lacuna/base/json.hpp"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "lacuna/base/error.hpp"

namespace {
std::string error_of(const std::string& text) {
  try {
    lacuna::parse_json(text, "metadata 'rope'", "a.safetensors");
  } catch (const lacuna::Error& e) {
    return e.what();
  }
  return "";
}
bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
}  // namespace

TEST_CASE("strict JSON: valid text is parsed") {
  const auto value = lacuna::parse_json(R"({"a": {"k": 1}, "b": {"k": [1, {"k": 2}]}})", "text", "");
  CHECK(value["b"]["k"][1]["k"] == 2);
}

TEST_CASE("strict JSON: syntax errors say what, where and at which column") {
  const std::string error = error_of("{\"a\": }");
  CHECK(holds(error, "metadata 'rope' is not valid JSON"));
  CHECK(holds(error, "line 1, column 7"));
  CHECK(holds(error, "(a.safetensors)"));
  CHECK_FALSE(holds(error, "json.exception"));
  CHECK_FALSE(error_of("").empty());
  CHECK_FALSE(error_of("{} {}").empty());
  CHECK_FALSE(error_of("1e999").empty());
  CHECK_FALSE(error_of("\"\xff\"").empty());
}

TEST_CASE("strict JSON: a key given twice is an error at any depth") {
  CHECK(holds(error_of(R"({"a": 1, "a": 2})"), R"("a" a second time)"));
  CHECK(holds(error_of(R"([{"x": {"b": 1, "c": {}, "b": 2}}])"), R"("b" a second time)"));
}

TEST_CASE("excerpts are short") {
  CHECK(lacuna::excerpt({1, 2}) == "[1,2]");
  CHECK(lacuna::excerpt(std::string(1000, 'x')).size() < 120);
}
