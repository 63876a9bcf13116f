// The tokens of a selection that are in no cache (centroids that stand for their keys), read besides.
#pragma once

#include "lacuna/attention/attention.hpp"
#include "lacuna/device/device.hpp"

namespace lacuna {

/// Floats that attend_extras() works with.
sdk::i64 extras_workspace(const Attention& a);
/// Merges a.read's extra tokens into out and lse, as attention over the same selection left them. Every array is memory
/// of the device; enqueues only.
void attend_extras(const Device& device, const Attention& a, float* workspace, float* out, float* lse);

}  // namespace lacuna
