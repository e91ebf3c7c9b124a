// A norm of a sum, or the gradient of one with its residual, and the narrow product of what is
// written. A block takes eight rows, a warp each, as layer_norm.cu does; it leaves them in shared
// memory, too, where its warps share the columns for the product.

#include "launch.h"
#include "layer_norm.h"
#include "layer_norm_rows.h"
#include "narrow.h"

namespace eri {
namespace {

constexpr int kTiles = kNarrowRanks / kTileRanks;
constexpr int kWarps = kTokens;  // of a block

// Rows are four vectors more than a multiple of eight apart: what four lanes each read of two rows
// lies in different banks.
template <typename Scalar, int kHeld>
struct Shared {
  static constexpr int kPitch = (32 * kHeld + 7) / 8 * 8 + 4;
  uint4 rows[kTokens][kPitch];
  Sums<kTiles, kWarps, 1> sums;

  // A warp's row; zeros where there is none.
  __device__ __forceinline__ void put(const Vector<Scalar> (&held)[kHeld], bool there) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = static_cast<int>(threadIdx.x) % 32 + 32 * k;
      store(&rows[threadIdx.x / 32][column], there ? held[k] : zeros<Scalar>());
    }
  }

  __device__ __forceinline__ void multiply_rows(const Narrow<Scalar>& narrow, const Shape& shape,
                                                Rows<uint4> result) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int tiles = (narrow.ranks + kTileRanks - 1) / kTileRanks;
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile) {
      float own[4] = {};
#pragma unroll
      for (int first = 0; first < 32 * kHeld; first += 4 * kWarps) {
        const int column = first + 4 * warp + lane % 4;
        const bool there = column < shape.columns;
        // what is behind a row is zeros
        add_vector(own, narrow, tile, there ? column : 0,
                   from_words<Scalar>(rows[lane / 4][column]));
      }
      sums.put(warp, 0, tile, own);
    }
    __syncthreads();
    sums.write(narrow, static_cast<int64_t>(blockIdx.x) * kTokens, shape.rows, result,
               shape.columns);
  }
};

template <typename Scalar, int kHeld>
__global__ void __launch_bounds__(32 * kWarps)
    forward_kernel(Rows<const uint4> x, Rows<const uint4> added, const uint4* __restrict__ weight,
                   const uint4* __restrict__ bias, Rows<uint4> total, Rows<uint4> n,
                   float2* __restrict__ mean_rstd, Shape shape, float eps,
                   const Narrow<Scalar> narrow) {
  __shared__ Shared<Scalar, kHeld> shared;
  const uint32_t row = blockIdx.x * kTokens + threadIdx.x / 32;
  const bool there = row < shape.rows;
  Vector<Scalar> held[kHeld];
  if (there) {
    const float2 moments = normalise_row<Scalar, kHeld, true>(
        x[row], added[row], total[row], weight, bias, n[row], shape, eps, held);
    if (threadIdx.x % 32 == 0) mean_rstd[row] = moments;
  }
  shared.put(held, there);
  shared.multiply_rows(narrow, shape, n);
}

template <typename Scalar, int kHeld>
__global__ void __launch_bounds__(32 * kWarps)
    backward_kernel(Rows<const uint4> dn, Rows<const uint4> x, Rows<const uint4> residual,
                    const uint4* __restrict__ weight, const uint4* __restrict__ bias,
                    const float2* __restrict__ mean_rstd, Rows<uint4> dx, Rows<uint4> n,
                    Shape shape, const Narrow<Scalar> narrow) {
  __shared__ Shared<Scalar, kHeld> shared;
  const uint32_t row = blockIdx.x * kTokens + threadIdx.x / 32;
  const bool there = row < shape.rows;
  Vector<Scalar> held[kHeld];
  if (there) {
    differentiate_row<Scalar, kHeld, true>(dn[row], x[row], residual[row], weight, bias,
                                           mean_rstd[row], dx[row], n[row], shape, held);
  }
  shared.put(held, there);
  shared.multiply_rows(narrow, shape, dx);
}

template <typename Scalar, int kHeld>
void launch_held(const LayerNormArguments& a, const Shape& shape, cudaStream_t stream) {
  const uint32_t blocks = (shape.rows + kTokens - 1) / kTokens;
  const Narrow<Scalar> narrow = narrow_of<Scalar>(a.narrow);
  const auto x = rows_of<Scalar>(a.x, a.x_stride);
  const auto result = rows_of<Scalar>(a.result, a.result_stride);
  const uint4* weight = static_cast<const uint4*>(a.weight);
  const uint4* bias = static_cast<const uint4*>(a.bias);
  float2* moments = reinterpret_cast<float2*>(a.mean_rstd);
  if (a.dn == nullptr) {
    forward_kernel<Scalar, kHeld><<<blocks, 32 * kWarps, 0, stream>>>(
        x, rows_of<Scalar>(a.added, a.added_stride), weight, bias, rows_of<Scalar>(a.sum, a.width),
        result, moments, shape, static_cast<float>(a.eps), narrow);
  } else {
    backward_kernel<Scalar, kHeld><<<blocks, 32 * kWarps, 0, stream>>>(
        rows_of<Scalar>(a.dn, a.dn_stride), x, rows_of<Scalar>(a.residual, a.residual_stride),
        weight, bias, moments, result, rows_of<Scalar>(a.again, a.width), shape, narrow);
  }
}

template <typename Scalar>
void launch(const LayerNormArguments& a, cudaStream_t stream) {
  const int columns = static_cast<int>(a.width / Vector<Scalar>::kSize);
  const Shape shape = {static_cast<uint32_t>(a.rows), columns, 1.0f / static_cast<float>(a.width)};
  if (columns <= 64) {
    launch_held<Scalar, 2>(a, shape, stream);
  } else if (columns <= 96) {
    launch_held<Scalar, 3>(a, shape, stream);
  } else {
    launch_held<Scalar, kLayerNormNarrowVectors / 32>(a, shape, stream);
  }
}

}  // namespace

const char* launch_layer_norm_narrow(const LayerNormArguments& arguments, void* stream) {
  return with_half_type(arguments.type, [&]<typename Scalar>() {
    launch<Scalar>(arguments, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace eri
