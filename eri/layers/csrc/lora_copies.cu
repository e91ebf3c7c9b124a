// A few blocks take a matrix; neighbouring threads write neighbouring numbers of its copy.

#include "launch.h"
#include "lora_copies.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // of a matrix

__device__ __forceinline__ void put(float* to, float number) { *to = number; }
__device__ __forceinline__ void put(__half* to, float number) { *to = __float2half_rn(number); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float number) {
  *to = __float2bfloat16_rn(number);
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads) copy_kernel(const MatrixCopy* __restrict__ table) {
  const MatrixCopy copy = table[blockIdx.x];
  const uint32_t columns = static_cast<uint32_t>(copy.columns);
  const uint32_t numbers = static_cast<uint32_t>(copy.rows) * columns;
  Scalar* target = static_cast<Scalar*>(copy.target);
#pragma unroll 4
  for (uint32_t i = blockIdx.y * kThreads + threadIdx.x; i < numbers; i += kBlocks * kThreads) {
    const uint32_t row = i / columns, column = i - row * columns;
    put(target + row * copy.target_row + column,
        copy.source[row * copy.source_row + column * copy.source_column]);
  }
}

}  // namespace

const char* launch_lora_copies(const void* table, int64_t copies, FloatType type,
                               void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const MatrixCopy* rows = static_cast<const MatrixCopy*>(table);
  const dim3 blocks(static_cast<uint32_t>(copies), kBlocks);
  return with_type(type, [&]<typename Scalar>() {
    copy_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(rows);
  });
}

}  // namespace eri
