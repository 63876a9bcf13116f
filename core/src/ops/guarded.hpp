// From exceptions to the error codes of the strategy interface.
#pragma once

#include <cstdio>
#include <exception>

#include "lacuna/base/error.hpp"
#include "lacuna/sdk/types.hpp"

namespace lacuna {

template <class F>
sdk::i32 guarded(sdk::Error* error, F f) noexcept {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    if (error) {
      error->code = 1;
      std::snprintf(error->text, sizeof error->text, "%s", e.what());
    }
    return 1;
  }
}

}  // namespace lacuna
