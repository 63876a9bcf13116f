// Everything a strategy plug-in needs; header-only.
#pragma once

#include "lacuna/sdk/context.hpp"
#include "lacuna/sdk/params.hpp"
#include "lacuna/sdk/strategy.hpp"
#include "lacuna/sdk/types.hpp"
