// The kernel of `eri::join_rows`; see eri/layers/join_rows.py.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace eri {

constexpr int kJoined = 3;  // tensors, at the most

// Strides and widths are in vectors of 16 bytes.
struct JoinRowsArguments {
  const void* parts[kJoined];
  int64_t strides[kJoined];  // of their rows
  void* result;
  int64_t count;  // of parts
  int64_t rows;
  int64_t width;  // of a part
  int64_t result_stride;
};

// Queues one kernel on a cudaStream_t; returns null, or what CUDA says is wrong.
const char* launch_join_rows(const JoinRowsArguments& arguments, void* stream);

}  // namespace eri
