#include "tensor_kernel.cuh"

namespace lacuna::cuda::attention {
template void launch_tensor<64>(const Job&, i64, cudaStream_t);
}  // namespace lacuna::cuda::attention
