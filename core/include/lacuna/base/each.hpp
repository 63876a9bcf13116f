// Loops whose bodies may throw.
#pragma once

#include <cstdint>
#include <exception>

namespace lacuna {

/// f(i) for i in [0, n), by several OpenMP threads from `worth_threads` on. Every i is run; of the exceptions the one
/// with the lowest i is thrown on.
template <class F>
void each(std::int64_t n, std::int64_t worth_threads, F f) {
  std::int64_t first = n;
  std::exception_ptr thrown;
#pragma omp parallel for schedule(dynamic, 4) if (n >= worth_threads)
  for (std::int64_t i = 0; i < n; ++i) {
    try {
      f(i);
    } catch (...) {
#pragma omp critical(lacuna_each)
      if (i < first) {
        first = i;
        thrown = std::current_exception();
      }
    }
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace lacuna
