// LayerNorm over rows with a frozen affine map; see eri/layers/layer_norm.py.
#pragma once

#include <cstdint>

#include "float_type.h"
#include "narrow_arguments.h"

namespace eri {

// Of a row, in vectors of 16 bytes: what the lanes of a warp can hold.
constexpr int64_t kLayerNormVectors = 320;
constexpr int64_t kLayerNormNarrowVectors = 160;  // with a narrow product

// Rows begin `stride` elements after each other; strides are multiples of 16 bytes, and all memory
// begins at one.
struct LayerNormArguments {
  const void* x;            // [rows, width]
  const void* added;        // the same, or null: x + added is what is normalised
  const void* dn;           // the same; null in the forward passes
  const void* residual;     // the same, added to dx; may be null
  const void* weight;       // [width]
  const void* bias;         // the same
  void* sum;                // x + added [rows, width], contiguous; null without `added`
  void* result;             // n or dx [rows, width]
  void* again;              // n [rows, width], contiguous; of the backward pass
  float* mean_rstd;         // [rows, 2]; written by the forward passes
  FloatType type;           // of all but mean_rstd
  int64_t rows;             //
  int64_t width;            // a multiple of the numbers in 16 bytes
  int64_t x_stride;         //
  int64_t added_stride;     //
  int64_t dn_stride;        //
  int64_t residual_stride;  //
  int64_t result_stride;    //
  double eps;               // added to the variance
  NarrowArguments narrow;   // of the result, which then is of a sum or has a residual
};

// Each queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_layer_norm(const LayerNormArguments& arguments, void* stream);
const char* launch_layer_norm_backward(const LayerNormArguments& arguments, void* stream);
const char* launch_layer_norm_narrow(const LayerNormArguments& arguments, void* stream);  // either

}  // namespace eri
