// What a warp does with a row: it keeps it in registers, so that it is read once: the mean, then the
// mean square around it, then the result. Lane l holds the vectors l, l + 32, ... of the row.
#pragma once

#include "row_tiles.h"
#include "vectors.h"

namespace eri {
namespace {

struct Shape {
  uint32_t rows;
  int columns;  // vectors of a row
  float share;  // 1 / numbers of a row
};

// Adds a row to the one that is held, rounds, and stores that.
template <typename Scalar, int kHeld>
__device__ __forceinline__ void add_row(const uint4* row, uint4* sum, int columns,
                                        Vector<Scalar> (&held)[kHeld]) {
  Vector<Scalar> added[kHeld];
  load_row(row, columns, added);
  each<Scalar, kHeld>(columns, [&](int k, int quad, int) {
    float v[4], a[4];
    unpack(held[k], quad, v);
    unpack(added[k], quad, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += a[i];
    pack(held[k], quad, v);
  });
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    if (column < columns) store(sum + column, held[k]);
  }
}

// n = (x - mean) rstd weight + bias, of x or of x + added; n is what is held in the end. The mean and
// 1 / the deviation.
template <typename Scalar, int kHeld, bool kAdd>
__device__ __forceinline__ float2 normalise_row(const uint4* x, const uint4* added, uint4* total,
                                                const uint4* __restrict__ weight,
                                                const uint4* __restrict__ bias, uint4* n,
                                                const Shape& shape, float eps,
                                                Vector<Scalar> (&held)[kHeld]) {
  const int columns = shape.columns;
  load_row(x, columns, held);
  if (kAdd) add_row(added, total, columns, held);
  float sum = 0.0f;
  each<Scalar, kHeld>(columns, [&](int k, int quad, int) {
    float v[4];
    unpack(held[k], quad, v);
    sum += (v[0] + v[1]) + (v[2] + v[3]);
  });
  const float mean = warp_sum(sum) * shape.share;
  float squares = 0.0f;
  each<Scalar, kHeld>(columns, [&](int k, int quad, int) {
    float v[4];
    unpack(held[k], quad, v);
#pragma unroll
    for (int i = 0; i < 4; ++i) squares = fmaf(v[i] - mean, v[i] - mean, squares);
  });
  const float rstd = rsqrtf(fmaf(warp_sum(squares), shape.share, eps));
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    if (column >= columns) break;
    const Vector<Scalar> slopes = load<Scalar>(weight + column);
    const Vector<Scalar> offsets = load<Scalar>(bias + column);
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float v[4], w[4], b[4];
      unpack(held[k], quad, v);
      unpack(slopes, quad, w);
      unpack(offsets, quad, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = fmaf((v[i] - mean) * rstd, w[i], b[i]);
      pack(held[k], quad, v);
    }
    store(n + column, held[k]);
  }
  return make_float2(mean, rstd);
}

// With g = weight * dn and z = (x - mean) * rstd: dx = rstd (g - mean(g) - z mean(g z)), to which
// the residual's gradient is added; dx is what is held in the end. And n once more.
template <typename Scalar, int kHeld, bool kResidual>
__device__ __forceinline__ void differentiate_row(const uint4* dn, const uint4* x,
                                                  const uint4* residual,
                                                  const uint4* __restrict__ weight,
                                                  const uint4* __restrict__ bias, float2 moments,
                                                  uint4* dx, uint4* n, const Shape& shape,
                                                  Vector<Scalar> (&held)[kHeld]) {
  const int columns = shape.columns;
  Vector<Scalar> gradients[kHeld], added[kHeld];
  load_row(dn, columns, gradients);
  load_row(x, columns, held);
  if (kResidual) load_row(residual, columns, added);
  const float mean = moments.x, rstd = moments.y;
  float sum = 0.0f, product = 0.0f;
  each<Scalar, kHeld>(columns, [&](int k, int quad, int column) {
    float g[4], v[4], w[4];
    unpack(gradients[k], quad, g);
    unpack(held[k], quad, v);
    unpack(load<Scalar>(weight + column), quad, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      g[i] *= w[i];
      sum += g[i];
      product = fmaf(g[i], (v[i] - mean) * rstd, product);
    }
  });
  const float of_g = warp_sum(sum) * shape.share;
  const float of_gz = warp_sum(product) * shape.share;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    if (column >= columns) break;
    const Vector<Scalar> slopes = load<Scalar>(weight + column);
    const Vector<Scalar> offsets = load<Scalar>(bias + column);
    Vector<Scalar> again;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float g[4], v[4], w[4], b[4], r[4], m[4];
      unpack(gradients[k], quad, g);
      unpack(held[k], quad, v);
      unpack(slopes, quad, w);
      unpack(offsets, quad, b);
      if (kResidual) unpack(added[k], quad, r);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = (v[i] - mean) * rstd;
        m[i] = fmaf(z, w[i], b[i]);
        v[i] = rstd * (fmaf(g[i], w[i], -of_g) - z * of_gz);
        if (kResidual) v[i] += r[i];
      }
      pack(held[k], quad, v);
      pack(again, quad, m);
    }
    store(dx + column, held[k]);
    store(n + column, again);
  }
}

}  // namespace
}  // namespace eri
