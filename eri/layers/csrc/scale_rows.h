// Rows times a weight, divided by their root mean square before or not; see
// eri/layers/scale_rows.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Of a row, in vectors of 16 bytes: what the threads of a block can hold.
constexpr int64_t kScaleRowsVectors = 1024;

// Rows begin `stride` elements after each other; strides are multiples of 16 bytes, and all memory
// begins at one.
struct ScaleRowsArguments {
  const void* x;          // [rows, width]
  const void* dy;         // the same; null in the forward pass
  const void* weight;     // [width]; null for ones
  void* result;           // y or dx [rows, width], contiguous
  void* weight_gradient;  // [width]; null where it is not wanted
  float* parts;           // [scale_rows_parts, width], of that gradient; for the kernels alone
  FloatType type;         // of all but the parts
  int64_t rows;           //
  int64_t width;          // a multiple of the numbers in 16 bytes
  int64_t x_stride;       //
  int64_t dy_stride;      //
  bool norm;              // whether rows are divided by their root mean square
  double eps;             // added to the mean square
};

// Blocks of the backward pass, each of which leaves its part of the weight's gradient; a function of
// the shape, the type and the current device.
int64_t scale_rows_parts(const ScaleRowsArguments& arguments);

// Queues a kernel, or two for a weight's gradient, on a cudaStream_t; returns null, or what CUDA
// says is wrong.
const char* launch_scale_rows(const ScaleRowsArguments& arguments, void* stream);

}  // namespace eri
