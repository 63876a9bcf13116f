// The main function of every test program. Programs of GPU tests end with 77 (skipped, to ctest) where there is no GPU.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#if defined(LACUNA_GPU_TESTS)
#include <cuda_runtime_api.h>

#include <cstdio>
#endif

int main(int argc, char** argv) {
#if defined(LACUNA_GPU_TESTS)
  constexpr int kSkipped = 77;
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::printf("skipped: no usable GPU (%s)\n", cudaGetErrorString(error));
    return kSkipped;
  }
#endif
  return doctest::Context(argc, argv).run();
}
