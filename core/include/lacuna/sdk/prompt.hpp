// Where the prompt ends.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Original positions below this one were cached before decoding began.
inline i64 prompt_end(Context& c) {
  const Queries q = c.current_queries();
  return q.first_position + (c.call().step < 0 ? q.count : -c.call().step);
}

}  // namespace lacuna::sdk
