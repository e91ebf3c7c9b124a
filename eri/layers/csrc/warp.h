// A warp as a whole.
#pragma once

namespace eri {
namespace {

constexpr unsigned int kWarp = ~0u;  // all lanes

// The sum over a warp in each of its lanes, in an order that never changes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWarp, value, offset);
  return value;
}

}  // namespace
}  // namespace eri
