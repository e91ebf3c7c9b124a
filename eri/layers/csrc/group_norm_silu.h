// GroupNorm with SiLU over maps that lie pixel by pixel; see eri/layers/group_norm_silu.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Limits of the kernels; eri/layers/group_norm_silu.py has the same.
constexpr int kGroupNormVectors = 320;           // of 16 bytes: the least run of whole groups
constexpr int64_t kGroupNormSamples = 65535;     // of a batch
constexpr int64_t kGroupNormSample = 1LL << 31;  // elements of one, groups of all: fewer

struct GroupNormArguments {
  const void* x;         // [samples, pixels, channels]; 16-byte aligned like dy and result
  const void* dy;        // the same; null in the forward pass
  const void* weight;    // [channels]
  const void* bias;      // [channels]
  const void* added;     // [samples, channels]: is added to x first; null adds nothing
  const void* plus;      // like x: is added to dx; null adds nothing
  void* result;          // y or dx, like x
  float* mean_rstd;      // [samples, groups, 2]; written by the forward pass
  float* workspace;      // group_norm_workspace() numbers
  FloatType type;        // of all that is not a float
  int64_t added_stride;  // elements from a sample's row of `added` to the next
  int64_t samples;       //
  int64_t pixels;        // of a sample
  int64_t channels;      // a multiple of `groups` and of the numbers in 16 bytes
  int64_t groups;        //
  double eps;            // added to the variance
  bool silu;             // whether SiLU follows
};

// How many floats of work space the current device needs: two for each group of each tile.
int64_t group_norm_workspace(const GroupNormArguments& arguments);

// Each queues two kernels on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_group_norm(const GroupNormArguments& arguments, void* stream);
const char* launch_group_norm_backward(const GroupNormArguments& arguments, void* stream);

}  // namespace eri
