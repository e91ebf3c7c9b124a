// The copies of `eri::lora_copies`; see eri/layers/lora_copies.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

constexpr int kMatrixCopyNumbers = 7;

// A row of the table, which is on the device.
struct MatrixCopy {
  const float* source;
  void* target;
  int64_t rows;
  int64_t columns;
  int64_t source_row;     // numbers from a row to the next
  int64_t source_column;  // and from a column to the next
  int64_t target_row;
};
static_assert(sizeof(MatrixCopy) == kMatrixCopyNumbers * sizeof(int64_t));

// Queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_lora_copies(const void* table, int64_t copies, FloatType type, void* stream);

}  // namespace eri
