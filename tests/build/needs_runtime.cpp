// A plug-in that does both things that plugin_symbols.py refuses.
#include <lacuna/sdk.hpp>

namespace lacuna {
int missing_in_sdk();
int visible_helper() { return missing_in_sdk(); }
}  // namespace lacuna
