// One pass over numbers without gaps. A thread takes kVectors vectors of 16 bytes, a block's width
// apart; all its loads are under way before the first is used.

#include "launch.h"
#include "swiglu.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;

__device__ __forceinline__ uint32_t first_vector() {
  return blockIdx.x * (kThreads * kVectors) + threadIdx.x;
}

template <typename Scalar>
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal<Scalar>(1.0f + exponential<Scalar>(-x));
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const uint4* __restrict__ gate, const uint4* __restrict__ value,
                   uint4* __restrict__ y, uint32_t count) {
  const uint32_t first = first_vector();
  Vector<Scalar> gates[kVectors], values[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = first + k * kThreads;
    if (i < count) {
      gates[k] = load<Scalar>(gate + i);
      values[k] = load<Scalar>(value + i);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = first + k * kThreads;
    if (i >= count) return;
    Vector<Scalar> result;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float g[4], v[4];
      unpack(gates[k], quad, g);
      unpack(values[k], quad, v);
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] *= g[n] * sigmoid<Scalar>(g[n]);
      pack(result, quad, v);
    }
    store(y + i, result);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const uint4* __restrict__ dy, const uint4* __restrict__ gate,
                    const uint4* __restrict__ value, uint4* __restrict__ d_gate,
                    uint4* __restrict__ d_value, uint32_t count) {
  const uint32_t first = first_vector();
  Vector<Scalar> gradients[kVectors], gates[kVectors], values[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = first + k * kThreads;
    if (i < count) {
      gradients[k] = load<Scalar>(dy + i);
      gates[k] = load<Scalar>(gate + i);
      values[k] = load<Scalar>(value + i);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t i = first + k * kThreads;
    if (i >= count) return;
    Vector<Scalar> to_gate, to_value;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float d[4], g[4], v[4];
      unpack(gradients[k], quad, d);
      unpack(gates[k], quad, g);
      unpack(values[k], quad, v);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float s = sigmoid<Scalar>(g[n]);
        v[n] *= d[n] * (s * fmaf(g[n], 1.0f - s, 1.0f));
        d[n] *= g[n] * s;
      }
      pack(to_gate, quad, v);
      pack(to_value, quad, d);
    }
    store(d_gate + i, to_gate);
    store(d_value + i, to_value);
  }
}

template <typename Scalar>
void launch(const SwigluArguments& a, cudaStream_t stream) {
  constexpr uint32_t kOfBlock = kThreads * kVectors;
  const uint32_t count = static_cast<uint32_t>(a.elements / Vector<Scalar>::kSize);
  const uint32_t blocks = (count - 1) / kOfBlock + 1;
  const uint4* gate = static_cast<const uint4*>(a.gate);
  const uint4* value = static_cast<const uint4*>(a.value);
  if (a.dy == nullptr) {
    forward_kernel<Scalar>
        <<<blocks, kThreads, 0, stream>>>(gate, value, static_cast<uint4*>(a.result), count);
  } else {
    backward_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(
        static_cast<const uint4*>(a.dy), gate, value, static_cast<uint4*>(a.d_gate),
        static_cast<uint4*>(a.d_value), count);
  }
}

}  // namespace

const char* launch_swiglu(const SwigluArguments& a, void* stream) {
  if (a.elements == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace eri
