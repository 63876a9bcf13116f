#include "lacuna/attention/cuda_attention.hpp"
#include "lacuna/base/error.hpp"

namespace lacuna {

namespace {
[[noreturn]] void refuse() {
  throw Error({"attention on a GPU", "a build with CUDA", "a CPU build", "", "Use device = \"cpu\"."});
}
}  // namespace

CudaAttentionPlan plan_cuda_attention(const Attention&) { refuse(); }
void attend_cuda(const Attention&, float*, float*, void*, std::size_t, void*) { refuse(); }
void list_keys_cuda(const Attention&, sdk::i32*, float*, sdk::i32*, sdk::i64, void*, void*) { refuse(); }

}  // namespace lacuna
