// Rows that threads keep in registers, so that each is read once: a team of threads takes one, a
// warp or a whole block. Thread t of a team holds the vectors t, t + kTeam, ... of its row.
#pragma once

#include "vectors.h"
#include "warp.h"

namespace eri {
namespace {

template <typename Scalar, int kHeld, int kTeam = 32>
__device__ __forceinline__ void load_row(const uint4* row, int columns,
                                         Vector<Scalar> (&vectors)[kHeld]) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % kTeam + kTeam * k;
    vectors[k] = column < columns ? load<Scalar>(row + column) : zeros<Scalar>();
  }
}

// visit(vector of the thread, quarter of it, column) for all that the thread holds.
template <typename Scalar, int kHeld, int kTeam = 32, typename Visit>
__device__ __forceinline__ void each(int columns, Visit visit) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % kTeam + kTeam * k;
    if (column < columns) {
#pragma unroll
      for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) visit(k, quad, column);
    }
  }
}

}  // namespace
}  // namespace eri
