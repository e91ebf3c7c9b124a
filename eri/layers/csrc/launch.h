// What the launchers of all kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "float_type.h"

namespace eri {

// What CUDA says is wrong with the kernels queued last; null if nothing is.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Calls launch.operator()<Scalar>() for a type; what CUDA says of it.
template <typename Launch>
const char* with_type(FloatType type, Launch launch) {
  if (type == FloatType::kFloat) {
    launch.template operator()<float>();
  } else if (type == FloatType::kHalf) {
    launch.template operator()<__half>();
  } else {
    launch.template operator()<__nv_bfloat16>();
  }
  return launch_error();
}

// The same for 16 bits alone.
template <typename Launch>
const char* with_half_type(FloatType type, Launch launch) {
  if (type == FloatType::kHalf) {
    launch.template operator()<__half>();
  } else {
    launch.template operator()<__nv_bfloat16>();
  }
  return launch_error();
}

}  // namespace eri
