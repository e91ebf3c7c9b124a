// The rotation of RoPE and its inverse; see eri/layers/rope.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Positions: fewer than this, so that float32 tells them apart.
constexpr int64_t kRopePositions = 1LL << 24;

// Elements of a sequence, and sequences: fewer than this.
constexpr int64_t kRopeElements = 1LL << 31;

// Strides are in elements, multiples of 16 bytes, and all memory begins at one.
struct RopeArguments {
  const void* x;           // [outer, inner, length, width]
  void* result;            // the same, contiguous
  FloatType type;          // of both
  int64_t outer;           //
  int64_t inner;           //
  int64_t length;          // positions
  int64_t width;           // a multiple of the numbers in 16 bytes
  int64_t outer_stride;    // of x
  int64_t inner_stride;    //
  int64_t length_stride;   //
  double base;             // of the angles
  bool inverse;            // whether angles are negative
};

// Queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_rope(const RopeArguments& arguments, void* stream);

}  // namespace eri
