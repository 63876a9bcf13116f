#include "lacuna/device/timing.hpp"

#include <algorithm>
#include <cmath>

#include "lacuna/base/error.hpp"

namespace lacuna {

Quartiles quartiles(std::vector<double> values) {
  if (values.empty()) throw Error({"quartiles of nothing", "at least one value", "none", "", ""});
  std::sort(values.begin(), values.end());
  const auto at = [&](double quantile) {
    const double place = quantile * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(place), above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(.25), at(.5), at(.75)};
}

}  // namespace lacuna
