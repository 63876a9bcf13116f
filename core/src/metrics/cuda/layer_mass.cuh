// A layer's queries with the dense log-sum-exp that is known, ready for sums of their probabilities.
#pragma once

#include "lacuna/attention/attention.hpp"
#include "lacuna/device/device.hpp"
#include "ops/cuda/mass.cuh"

namespace lacuna {

/// `device` without a share in it: it outlives the call that allocates from it.
inline std::shared_ptr<Device> borrowed(Device& device) { return {std::shared_ptr<Device>(), &device}; }

/// All of a call's queries, at the last slots of every KV row.
struct LayerMass {
  Buffer<unsigned char> memory;
  cuda::Mass mass;
};

/// dense_lse [heads, queries], natural, on the device, like the pointers of `a`.
LayerMass prepare_layer_mass(const Attention& a, const float* dense_lse, Device& device, const char* op);

}  // namespace lacuna
