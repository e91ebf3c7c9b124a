// The gate of a SwiGLU, forward and backward; see eri/layers/swiglu.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Fewer than this, so that vectors can be counted with 32 bits.
constexpr int64_t kSwigluElements = 1LL << 34;

// Numbers without gaps, as many of each: a whole number of vectors of 16 bytes.
struct SwigluArguments {
  const void* gate;   //
  const void* value;  //
  const void* dy;     // null in the forward pass
  void* result;       // y; null in the backward pass
  void* d_gate;       // of the backward pass
  void* d_value;      // the same
  FloatType type;     // of all of them
  int64_t elements;   //
};

// Queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_swiglu(const SwigluArguments& arguments, void* stream);

}  // namespace eri
