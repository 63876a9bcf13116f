// What a call that must fail says.
#pragma once

#include <doctest/doctest.h>

#include <initializer_list>
#include <string>

#include "lacuna/base/error.hpp"

/// The text of the Error that f throws; "" (and a failed check) if it throws none.
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const lacuna::Error& e) {
    return e.what();
  }
  FAIL_CHECK("no error was thrown");
  return "";
}

/// f throws one Error whose text holds each of the parts.
template <class F>
void expect_error(F f, std::initializer_list<const char*> parts) {
  const std::string text = error_of(f);
  for (const char* part : parts) {
    INFO("error: ", text, "\nmissing: ", std::string(part));
    CHECK(text.find(part) != std::string::npos);
  }
}
