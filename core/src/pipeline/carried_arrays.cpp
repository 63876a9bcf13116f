#include "lacuna/base/error.hpp"
#include "lacuna/pipeline/runtime.hpp"

namespace lacuna {

void* CarriedArrays::array(const std::string& key, sdk::i64 bytes, const std::shared_ptr<Device>& device) {
  auto& buffer = arrays_[key];
  if (buffer.size() == 0 && bytes > 0) {
    buffer = Buffer<std::byte>(device, bytes);
    device->fill(buffer.data(), 0, static_cast<std::size_t>(bytes));
  }
  if (buffer.size() != bytes)
    throw Error(Problem{"a carried array has another size in this layer", std::to_string(buffer.size()) + " bytes",
                        std::to_string(bytes), "array '" + key + "'", "ask for one size in every layer"});
  return buffer.data();
}

}  // namespace lacuna
