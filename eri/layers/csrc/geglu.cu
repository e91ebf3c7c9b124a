// One pass over rows of values and gates. A thread handles kVectors vectors of 16 bytes of the
// result, all of whose loads are on their way before the first is used.

#include <cuda_runtime.h>

#include "geglu.h"
#include "vectors.cuh"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;

// Where a vector of the result has its value; its gate is `columns` vectors further on.
__device__ __forceinline__ int64_t value_of(uint32_t vector, uint32_t columns) {
  return static_cast<int64_t>(vector) + static_cast<int64_t>(vector / columns) * columns;
}

__device__ __forceinline__ float normal_cdf(float x) {
  return fmaf(0.5f, erff(x * 0.70710678118654752f), 0.5f);
}

template <typename Scalar>
__device__ __forceinline__ float normal_density(float x) {
  return 0.39894228040143268f * exponential<Scalar>(-0.5f * x * x);
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const uint4* __restrict__ u, uint4* __restrict__ a, uint32_t vectors,
                   uint32_t columns) {
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  Vector<Scalar> values[kVectors], gates[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t vector = first + k * kThreads;
    if (vector < vectors) {
      const int64_t at = value_of(vector, columns);
      values[k] = load<Scalar>(u + at);
      gates[k] = load<Scalar>(u + at + columns);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t vector = first + k * kThreads;
    if (vector >= vectors) return;
    Vector<Scalar> result;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float v[4], g[4];
      unpack(values[k], quad, v);
      unpack(gates[k], quad, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= g[i] * normal_cdf(g[i]);
      pack(result, quad, v);
    }
    store(a + vector, result);
  }
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const uint4* __restrict__ da, const uint4* __restrict__ u,
                    uint4* __restrict__ du, uint32_t vectors, uint32_t columns) {
  const uint32_t first = blockIdx.x * (kThreads * kVectors) + threadIdx.x;
  Vector<Scalar> gradients[kVectors], values[kVectors], gates[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t vector = first + k * kThreads;
    if (vector < vectors) {
      const int64_t at = value_of(vector, columns);
      gradients[k] = load_last<Scalar>(da + vector);
      values[k] = load_last<Scalar>(u + at);
      gates[k] = load_last<Scalar>(u + at + columns);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t vector = first + k * kThreads;
    if (vector >= vectors) return;
    Vector<Scalar> to_value, to_gate;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float d[4], v[4], g[4];
      unpack(gradients[k], quad, d);
      unpack(values[k], quad, v);
      unpack(gates[k], quad, g);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float cdf = normal_cdf(g[i]);
        const float slope = fmaf(g[i], normal_density<Scalar>(g[i]), cdf);
        v[i] *= d[i] * slope;
        d[i] *= g[i] * cdf;
      }
      pack(to_value, quad, d);
      pack(to_gate, quad, v);
    }
    const int64_t at = value_of(vector, columns);
    store(du + at, to_value);
    store(du + at + columns, to_gate);
  }
}

template <typename Scalar>
void launch(const GegluArguments& a, cudaStream_t stream) {
  const uint32_t columns = static_cast<uint32_t>(a.width / Vector<Scalar>::kSize);
  const uint32_t vectors = static_cast<uint32_t>(a.rows * columns);
  const uint32_t blocks = (vectors + kThreads * kVectors - 1) / (kThreads * kVectors);
  const uint4* u = static_cast<const uint4*>(a.u);
  const uint4* da = static_cast<const uint4*>(a.da);
  uint4* result = static_cast<uint4*>(a.result);
  if (da == nullptr) {
    forward_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(u, result, vectors, columns);
  } else {
    backward_kernel<Scalar><<<blocks, kThreads, 0, stream>>>(da, u, result, vectors, columns);
  }
}

const char* launch_either(const GegluArguments& a, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (a.rows == 0 || a.width == 0) return nullptr;
  if (a.type == GegluType::kFloat) {
    launch<float>(a, stream);
  } else if (a.type == GegluType::kHalf) {
    launch<__half>(a, stream);
  } else {
    launch<__nv_bfloat16>(a, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_geglu(const GegluArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

const char* launch_geglu_backward(const GegluArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

}  // namespace eri
