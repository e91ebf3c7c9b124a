// The kernel of `eri::add_maps_`; see eri/layers/add_maps.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Widths are in vectors of 16 bytes; all three begin at a multiple of that.
struct AddMapsArguments {
  void* y;           // [pixels, width]; is added to
  const void* x;     // the same, or null
  const void* bias;  // [width]
  FloatType type;    // of all three
  int64_t pixels;    // of all samples
  int64_t width;     // of a pixel
};

// Queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_add_maps(const AddMapsArguments& arguments, void* stream);

}  // namespace eri
