// A thread copies a vector of 16 bytes of kRows rows that follow each other.

#include "join_rows.h"
#include "launch.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;

__global__ void __launch_bounds__(kThreads) join_kernel(const JoinRowsArguments a) {
  const uint32_t width = static_cast<uint32_t>(a.width);
  const uint32_t columns = static_cast<uint32_t>(a.count) * width;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t column = thread % columns;
  const int64_t first = static_cast<int64_t>(thread / columns) * kRows;
  const uint32_t part = column / width;
  const uint4* source = static_cast<const uint4*>(a.parts[0]);
  int64_t stride = a.strides[0];
#pragma unroll
  for (int k = 1; k < kJoined; ++k) {
    if (part == k) {
      source = static_cast<const uint4*>(a.parts[k]);
      stride = a.strides[k];
    }
  }
  source += first * stride + (column - part * width);
  uint4* result = static_cast<uint4*>(a.result) + first * a.result_stride + column;
  uint4 held[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k < a.rows) held[k] = __ldg(source + k * stride);
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (first + k < a.rows) result[k * a.result_stride] = held[k];
  }
}

}  // namespace

const char* launch_join_rows(const JoinRowsArguments& a, void* stream) {
  const int64_t threads = (a.rows + kRows - 1) / kRows * a.count * a.width;
  const uint32_t blocks = static_cast<uint32_t>((threads + kThreads - 1) / kThreads);
  if (blocks > 0) join_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_error();
}

}  // namespace eri
