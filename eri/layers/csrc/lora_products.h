// The skinny products of low-rank updates; see eri/layers/lora_products.py and narrow.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

// Of all layers or groups side by side.
constexpr int64_t kLoraMostRanks = 4096;
// Gradients of so many inputs, which one launch computes.
constexpr int kLoraGradients = 4;
// Groups whose rows are joined, at the most.
constexpr int kLoraJoined = 3;

// Strides and widths are in numbers; every row begins at a multiple of 16 bytes.
struct LoraDownArguments {
  void* rows;        // [tokens, groups * width], and groups * ranks more with a tail
  const void* down;  // [groups * ranks, width]
  void* hidden;      // [tokens, groups * ranks], contiguous
  FloatType type;    // of all
  bool has_tail;     // whether the products are written behind the rows, too
  float scale;       // of the products
  int64_t tokens;    //
  int64_t stride;    // of rows
  int64_t down_stride;
  int64_t width;     // of a group
  int64_t ranks;     // of a group, a multiple of 8
  int64_t groups;    //
  // Where each group of rows that are joined on the way is read, [tokens, width] in 16 bits; `rows`
  // have a tail then, and are written as a whole. Null: they are there.
  const void* sources[kLoraJoined];
  int64_t source_strides[kLoraJoined];
};

struct LoraGradientArguments {
  const void* dy;   // [tokens, layers * outputs]
  const void* x;    // [tokens, inputs]
  const void* p;    // [tokens, layers * ranks]
  const void* h;    // the same
  float* d_down;    // [layers * rank, inputs], contiguous
  float* d_up;      // [layers, outputs, rank], contiguous
  FloatType type;   // of the first four
  int64_t tokens;   //
  int64_t dy_stride, x_stride, p_stride, h_stride;
  int64_t outputs;  // of a layer
  int64_t inputs;   //
  int64_t layers;   //
  int64_t rank;     // of a layer
  int64_t ranks;    // the same, padded to a multiple of 8
};

// Each queues one kernel on a cudaStream_t (gradients in float32 one each); returns null, or what
// CUDA says is wrong. All gradients are of one type.
const char* launch_lora_down(const LoraDownArguments& arguments, void* stream);
const char* launch_lora_gradients(const LoraGradientArguments* arguments, int count, void* stream);

}  // namespace eri
