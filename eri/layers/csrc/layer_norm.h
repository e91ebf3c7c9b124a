// LayerNorm over rows with a frozen affine map; see eri/layers/layer_norm.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Of a row, in vectors of 16 bytes: what the lanes of a warp can hold.
constexpr int64_t kLayerNormVectors = 320;

struct LayerNormArguments {
  const void* x;         // [rows, width]; 16-byte aligned like all that follow
  const void* dn;        // the same; null in the forward pass
  const void* residual;  // the same, added to dx; may be null
  const void* weight;    // [width]
  const void* bias;      // [width]; null in the backward pass
  void* result;          // n or dx, like x
  float* mean_rstd;      // [rows, 2]; written by the forward pass
  FloatType type;        // of all but mean_rstd
  int64_t rows;          //
  int64_t width;         // a multiple of the numbers in 16 bytes
  double eps;            // added to the variance
};

// Each queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_layer_norm(const LayerNormArguments& arguments, void* stream);
const char* launch_layer_norm_backward(const LayerNormArguments& arguments, void* stream);

}  // namespace eri
