#include <lacuna/sdk.hpp>

namespace wrong_abi {
extern const lacuna::sdk::Descriptor descriptor;
const lacuna::sdk::Descriptor descriptor = {
    lacuna::sdk::kMagic, lacuna::sdk::kAbiMajor + 98, 0, 0, 0, lacuna::sdk::kCxxRuntime, "9.9", nullptr, 0};
}  // namespace wrong_abi
BOOST_DLL_ALIAS(wrong_abi::descriptor, lacuna_plugin)
