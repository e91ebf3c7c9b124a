// A warp takes a row and keeps it in registers, so that it is read once: the mean, then the mean
// square around it, then the result. Lane l holds the vectors l, l + 32, ... of the row.

#include "layer_norm.h"
#include "launch.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kWarps = 4;  // of a block; a row each
constexpr unsigned int kWarp = ~0u;

struct Shape {
  uint32_t rows;
  int columns;  // vectors of a row
  float share;  // 1 / numbers of a row
};

// The sum over a warp in each of its lanes, in an order that never changes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWarp, value, offset);
  return value;
}

__device__ __forceinline__ uint32_t row_of_warp() {
  return blockIdx.x * kWarps + threadIdx.x / 32;
}

template <typename Scalar, int kHeld>
__device__ __forceinline__ void load_row(const uint4* row, int columns,
                                         Vector<Scalar> (&vectors)[kHeld]) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    vectors[k] = column < columns ? load<Scalar>(row + column) : zeros<Scalar>();
  }
}

// visit(vector of the lane, quarter of it, column) for all that the lane holds.
template <typename Scalar, int kHeld, typename Visit>
__device__ __forceinline__ void each(int columns, Visit visit) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    if (column < columns) {
#pragma unroll
      for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) visit(k, quad, column);
    }
  }
}

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

template <typename Scalar, int kHeld, bool kAdd>
__global__ void __launch_bounds__(32 * kWarps)
    forward_kernel(Rows<const uint4> x, Rows<const uint4> added, const uint4* __restrict__ weight,
                   const uint4* __restrict__ bias, Rows<uint4> total, Rows<uint4> n,
                   float2* __restrict__ mean_rstd, Shape shape, float eps) {
  const uint32_t row = row_of_warp();
  const int columns = shape.columns;
  if (row >= shape.rows) return;
  Vector<Scalar> held[kHeld];
  load_row(x[row], columns, held);
  if (kAdd) add_row(added[row], total[row], columns, held);
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
  if (threadIdx.x % 32 == 0) mean_rstd[row] = make_float2(mean, rstd);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
    if (column >= columns) return;
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
    store(n[row] + column, held[k]);
  }
}

// With g = weight * dn and z = (x - mean) * rstd: dx = rstd (g - mean(g) - z mean(g z)).
template <typename Scalar, int kHeld, bool kResidual>
__global__ void __launch_bounds__(32 * kWarps)
    backward_kernel(Rows<const uint4> dn, Rows<const uint4> x, Rows<const uint4> residual,
                    const uint4* __restrict__ weight, const uint4* __restrict__ bias,
                    const float2* __restrict__ mean_rstd, Rows<uint4> dx, Rows<uint4> n,
                    Shape shape) {
  const uint32_t row = row_of_warp();
  const int columns = shape.columns;
  if (row >= shape.rows) return;
  Vector<Scalar> gradients[kHeld], held[kHeld], added[kHeld];
  load_row(dn[row], columns, gradients);
  load_row(x[row], columns, held);
  if (kResidual) load_row(residual[row], columns, added);
  const float2 moments = mean_rstd[row];
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
    if (column >= columns) return;
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
    store(dx[row] + column, held[k]);
    store(n[row] + column, again);
  }
}

template <typename Scalar, int kHeld>
void launch_held(const LayerNormArguments& a, const Shape& shape, cudaStream_t stream) {
  const uint32_t blocks = (shape.rows + kWarps - 1) / kWarps;
  const auto x = rows_of<Scalar>(a.x, a.x_stride);
  const auto added = rows_of<Scalar>(a.added, a.added_stride);
  const auto dn = rows_of<Scalar>(a.dn, a.dn_stride);
  const auto residual = rows_of<Scalar>(a.residual, a.residual_stride);
  const auto sum = rows_of<Scalar>(a.sum, a.width);
  const auto again = rows_of<Scalar>(a.again, a.width);
  const auto result = rows_of<Scalar>(a.result, a.result_stride);
  const uint4* weight = static_cast<const uint4*>(a.weight);
  const uint4* bias = static_cast<const uint4*>(a.bias);
  float2* moments = reinterpret_cast<float2*>(a.mean_rstd);
  const auto forward = [&](auto kernel) {
    kernel<<<blocks, 32 * kWarps, 0, stream>>>(x, added, weight, bias, sum, result, moments, shape,
                                               static_cast<float>(a.eps));
  };
  const auto backward = [&](auto kernel) {
    kernel<<<blocks, 32 * kWarps, 0, stream>>>(dn, x, residual, weight, bias, moments, result, again,
                                               shape);
  };
  if (a.dn == nullptr) {
    a.added == nullptr ? forward(forward_kernel<Scalar, kHeld, false>)
                       : forward(forward_kernel<Scalar, kHeld, true>);
  } else {
    a.residual == nullptr ? backward(backward_kernel<Scalar, kHeld, false>)
                          : backward(backward_kernel<Scalar, kHeld, true>);
  }
}

template <typename Scalar>
void launch(const LayerNormArguments& a, cudaStream_t stream) {
  const int columns = static_cast<int>(a.width / Vector<Scalar>::kSize);
  const Shape shape = {static_cast<uint32_t>(a.rows), columns, 1.0f / static_cast<float>(a.width)};
  if (columns <= 32) {
    launch_held<Scalar, 1>(a, shape, stream);
  } else if (columns <= 64) {
    launch_held<Scalar, 2>(a, shape, stream);
  } else if (columns <= 96) {
    launch_held<Scalar, 3>(a, shape, stream);
  } else if (columns <= 160) {
    launch_held<Scalar, 5>(a, shape, stream);
  } else {
    launch_held<Scalar, kLayerNormVectors / 32>(a, shape, stream);
  }
}

const char* launch_either(const LayerNormArguments& a, void* stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

const char* launch_layer_norm(const LayerNormArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

const char* launch_layer_norm_backward(const LayerNormArguments& arguments, void* stream) {
  return launch_either(arguments, stream);
}

}  // namespace eri
