#include "cuda_gemm.hpp"

#include <cublasLt.h>
#include <dlfcn.h>

#include <string>
#include <type_traits>
#include <utility>

#include "lacuna/base/error.hpp"

namespace lacuna {
namespace {

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw Error({std::string(call) + " failed", "", "cuBLAS status " + std::to_string(status), "", ""});
}

/// The calls that a product needs, with the header's types.
struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) matmul;

  static const Library* get() {
    static const std::unique_ptr<Library> library = load();
    return library.get();
  }

 private:
  static std::unique_ptr<Library> load() {
    // By its name where the loader knows it, else where this build found it.
    void* handle = dlopen("libcublasLt.so." LACUNA_CUBLASLT_MAJOR, RTLD_NOW | RTLD_LOCAL);
    if (!handle) handle = dlopen(LACUNA_CUBLASLT_PATH, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return nullptr;
    auto l = std::make_unique<Library>();
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      return function != nullptr;
    };
    const bool complete =
        find("cublasLtCreate", l->create) && find("cublasLtDestroy", l->destroy) &&
        find("cublasLtMatmulDescCreate", l->desc_create) && find("cublasLtMatmulDescDestroy", l->desc_destroy) &&
        find("cublasLtMatmulDescSetAttribute", l->desc_set) && find("cublasLtMatrixLayoutCreate", l->layout_create) &&
        find("cublasLtMatrixLayoutDestroy", l->layout_destroy) &&
        find("cublasLtMatmulPreferenceCreate", l->preference_create) &&
        find("cublasLtMatmulPreferenceDestroy", l->preference_destroy) &&
        find("cublasLtMatmulPreferenceSetAttribute", l->preference_set) &&
        find("cublasLtMatmulAlgoGetHeuristic", l->heuristic) && find("cublasLtMatmul", l->matmul);
    return complete ? std::move(l) : nullptr;
  }
};

template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cublasStatus_t (*)(Handle)>;

template <class Handle, class... Arguments>
Owned<Handle> owned(cublasStatus_t (*create)(Handle*, Arguments...), cublasStatus_t (*destroy)(Handle),
                    std::type_identity_t<Arguments>... arguments) {
  Handle handle = nullptr;
  check(create(&handle, arguments...), "creation of a cuBLASLt descriptor");
  return {handle, destroy};
}

class LtGemm final : public Gemm {
 public:
  LtGemm(const Library& library, int n, const void* a, const void* b, void* c, void* workspace, std::size_t bytes)
      : lt_(library),
        a_(a),
        b_(b),
        c_(c),
        workspace_(workspace),
        bytes_(bytes),
        handle_(owned(lt_.create, lt_.destroy)),
        product_(owned(lt_.desc_create, lt_.desc_destroy, CUBLAS_COMPUTE_32F, CUDA_R_32F)),
        layout_(owned(lt_.layout_create, lt_.layout_destroy, CUDA_R_16BF, static_cast<std::uint64_t>(n),
                      static_cast<std::uint64_t>(n), n)) {
    const auto preference = owned(lt_.preference_create, lt_.preference_destroy);
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check(lt_.desc_set(product_.get(), CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
          "cublasLtMatmulDescSetAttribute");
    check(lt_.preference_set(preference.get(), CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes_, sizeof bytes_),
          "cublasLtMatmulPreferenceSetAttribute");
    int found = 0;
    check(lt_.heuristic(handle_.get(), product_.get(), layout_.get(), layout_.get(), layout_.get(), layout_.get(),
                        preference.get(), 1, &best_, &found),
          "cublasLtMatmulAlgoGetHeuristic");
    if (found == 0) throw Error({"cuBLASLt has no kernel for a bf16 product on this GPU", "", "", "", ""});
  }
  void enqueue(cudaStream_t stream) override {
    const float one = 1.f, zero = 0.f;
    check(lt_.matmul(handle_.get(), product_.get(), &one, a_, layout_.get(), b_, layout_.get(), &zero, c_,
                     layout_.get(), c_, layout_.get(), &best_.algo, workspace_, bytes_, stream),
          "cublasLtMatmul");
  }

 private:
  const Library& lt_;
  const void *a_, *b_;
  void *c_, *workspace_;
  std::size_t bytes_;
  Owned<cublasLtHandle_t> handle_;
  Owned<cublasLtMatmulDesc_t> product_;
  Owned<cublasLtMatrixLayout_t> layout_;
  cublasLtMatmulHeuristicResult_t best_{};
};

}  // namespace

std::unique_ptr<Gemm> Gemm::make(int n, const void* a, const void* b, void* c, void* workspace, std::size_t bytes) {
  const Library* library = Library::get();
  if (!library) return nullptr;
  return std::make_unique<LtGemm>(*library, n, a, b, c, workspace, bytes);
}

}  // namespace lacuna
