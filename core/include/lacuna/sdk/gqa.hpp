// What the parameter gqa asks of a strategy that reduces a group's scores itself.
#pragma once

#include "lacuna/sdk/context.hpp"

namespace lacuna::sdk {

/// Whether every query head chooses by itself.
inline bool ranks_each_head(Gqa g) { return g == Gqa::none || g == Gqa::union_; }

/// How the heads of a group become one, where they do.
inline Reduce reduce_of(Gqa g) { return g == Gqa::max ? Reduce::max : g == Gqa::mean ? Reduce::mean : Reduce::sum; }

}  // namespace lacuna::sdk
