// The gate's backward pass with two gradients of low-rank updates beside it; see
// eri/layers/geglu_lora.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

constexpr int64_t kGegluLoraRanks = 16;  // of p and of h, padding included, at most
// Rows, and values in one: fewer than this, so that numbers of h can be counted with 32 bits.
constexpr int64_t kGegluLoraRows = 1LL << 28;

// Rows begin `stride` elements after each other; strides are multiples of 16 bytes, and all memory
// begins at one.
struct GegluLoraArguments {
  const void* da;      // [rows, width]
  const void* u;       // [rows, 2 * width]: values, gates
  void* du;            // like u
  const void* p;       // [rows, out_ranks]: of the layer that reads a
  const void* h;       // [rows, in_ranks]: of the layer that gave u
  float* d_down;       // [out_rank, width], contiguous: p^T a is added
  float* d_up;         // [2 * width, in_rank], contiguous: du^T h is added
  const void* up;      // [in_ranks, 2 * width]: B^T of the layer that gave u
  void* hidden;        // [rows, in_ranks], contiguous: scale du B, written behind du, too
  void* work;          // [slabs, rows, in_ranks] of float
  float scale;         //
  FloatType type;      // of all but the sums, not float
  int64_t rows;        //
  int64_t width;       // a multiple of 8
  int64_t da_stride, u_stride, du_stride, p_stride, h_stride, up_stride;
  int64_t out_rank, in_rank;
  int64_t out_ranks, in_ranks;  // the same, padded to a multiple of 8
};

// Slabs of columns, each of which has a part in the sums of `hidden`.
constexpr int64_t kGegluLoraSlab = 64;
inline int64_t geglu_lora_slabs(int64_t width) {
  return (width + kGegluLoraSlab - 1) / kGegluLoraSlab;
}

// Queues two kernels on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_geglu_lora(const GegluLoraArguments& arguments, void* stream);

}  // namespace eri
