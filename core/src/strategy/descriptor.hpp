// What a library's descriptor must be before anything of it is used.
#pragma once

#include <string>

#include "lacuna/sdk/strategy.hpp"

namespace lacuna {

/// Throws Error (where = library) unless the descriptor is of this ABI, struct sizes and C++ runtime and lists entries.
/// Reads no field before the ones that vouch for it.
void check_descriptor(const sdk::Descriptor& descriptor, const std::string& library);

/// A strategy's table of a checked descriptor; what its ABI minor did not have yet is null.
sdk::Entry whole_entry(const sdk::Entry& entry, int abi_minor);

/// Throws Error unless names, parameters, constraints, defaults, presets and dense point of a strategy are complete and
/// agree.
void check_entry(const sdk::Entry& entry, const std::string& library);

}  // namespace lacuna
