#include "cuda_factory.hpp"
#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

[[noreturn]] void refuse() {
  throw Error({"no CUDA in this build", "a build with CUDA for operations on a GPU", "a call on a device", "",
               "Use device = \"cpu\", or install the CUDA toolkit and build with a preset that finds it."});
}

}  // namespace

std::unique_ptr<CoreOps> make_cuda_ops(const sdk::Call&, Cost&, void*, std::size_t) { refuse(); }

std::size_t cuda_ops_workspace_bytes(const sdk::Layer&, sdk::i32, sdk::i64, sdk::i64) { refuse(); }

}  // namespace lacuna
