// Loops of the core that run where the arrays are. A file that calls for_each with a LACUNA_HD lambda stands under
// PORTABLE_SOURCES of its module: nvcc compiles it in CUDA builds.
#pragma once

#include "lacuna/device/device.hpp"
#include "lacuna/sdk/context.hpp"

namespace lacuna {

/// f(i) for i in [0, n): OpenMP threads on the CPU, the device's stream on a GPU (never synchronises, capturable). f is
/// a `[=] LACUNA_HD (i64 i)` lambda that writes to places that no other i touches. Throws sdk::Failure for a failed
/// launch, and for a GPU in a build without CUDA.
template <class F>
void for_each(const Device& device, sdk::i64 n, F f) {
  sdk::detail::for_each(device.on_device(), device.stream(), n, f);
}

}  // namespace lacuna
