// The gate of a feed-forward, forward and backward; see eri/layers/geglu.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Of u: fewer than this, so that threads and rows can be counted with 32 bits.
constexpr int64_t kGegluElements = 1LL << 34;

// Rows begin `stride` elements after each other; strides are multiples of 16 bytes, and all memory
// begins at one.
struct GegluArguments {
  const void* u;          // [rows, 2 * width]: values, gates
  const void* da;         // [rows, width]; null in the forward pass
  void* result;           // a [rows, width], or du [rows, 2 * width]
  void* again;            // a [rows, width], contiguous; of the backward pass
  FloatType type;         // of all of them
  int64_t rows;           //
  int64_t width;          // a multiple of the numbers in 16 bytes
  int64_t u_stride;       //
  int64_t da_stride;      //
  int64_t result_stride;  //
};

// Each queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_geglu(const GegluArguments& arguments, void* stream);
const char* launch_geglu_backward(const GegluArguments& arguments, void* stream);

}  // namespace eri
