// A norm of a sum, or the gradient of one with its residual, and the narrow product of what is
// written. A block takes eight rows, a warp each, as layer_norm.cu does; it leaves them in shared
// memory, too, where its warps share the columns for the product.

#include "launch.h"
#include "layer_norm.h"
#include "layer_norm_rows.h"
#include "tensor_cores.h"

namespace eri {
namespace {

constexpr int kTokens = 8;      // rows of a block, a warp each
constexpr int kTileRanks = 16;  // of a product
constexpr int kTiles = kNarrowRanks / kTileRanks;

template <typename Scalar>
struct Narrow {
  const uint4* down;  // [ranks, numbers of a row]
  int64_t stride;     // vectors from one rank to the next
  uint32_t* hidden;   // H [rows, ranks], two numbers in a word
  int ranks;          // a multiple of 8
  float scale;
};

template <typename Scalar>
Narrow<Scalar> narrow_of(const NarrowArguments& a) {
  return {static_cast<const uint4*>(a.down), a.down_stride / Vector<Scalar>::kSize,
          static_cast<uint32_t*>(a.hidden), static_cast<int>(a.ranks), a.scale};
}

// sums += ranks of a tile times a vector of the lane's row, which lies at this column.
template <typename Scalar>
__device__ __forceinline__ void add_vector(float (&sums)[4], const Narrow<Scalar>& narrow, int tile,
                                           int column, const Vector<Scalar>& row) {
  // ranks that are not there repeat the last one and are written nowhere
  const int rank = tile * kTileRanks + static_cast<int>(threadIdx.x) % 32 / 4;
  const uint4 low = __ldg(narrow.down + min(rank, narrow.ranks - 1) * narrow.stride + column);
  const uint4 high = __ldg(narrow.down + min(rank + 8, narrow.ranks - 1) * narrow.stride + column);
  const uint32_t first[4] = {low.x, high.x, low.y, high.y};
  const uint32_t second[4] = {low.z, high.z, low.w, high.w};
  multiply_add<Scalar>(sums, first, row.words[0], row.words[1]);
  multiply_add<Scalar>(sums, second, row.words[2], row.words[3]);
}

// What the warps of a block have added up, a tile of ranks after the other.
struct Sums {
  static constexpr int kRow = kTileRanks + 4;  // of a token, so that lanes meet different banks
  float of[kTokens][kTiles][kTokens][kRow];

  __device__ __forceinline__ void put(int tile, const float (&sums)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, rank = lane / 4, token = lane % 4 * 2;
    auto& mine = of[threadIdx.x / 32][tile];
    mine[token][rank] = sums[0];
    mine[token + 1][rank] = sums[1];
    mine[token][rank + 8] = sums[2];
    mine[token + 1][rank + 8] = sums[3];
  }

  // Adds the warps up in their order, and writes H twice: compact, and behind the rows it is of.
  template <typename Scalar>
  __device__ __forceinline__ void write(const Narrow<Scalar>& narrow, int64_t first_row,
                                        int64_t rows, Rows<uint4> result, int columns) const {
    const int words = narrow.ranks / 2;
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * words; i += 32 * kTokens) {
      const int token = i / words, word = i % words;
      const int64_t row = first_row + token;
      if (row >= rows) return;
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kTokens; ++w) {
        const float* from = &of[w][2 * word / kTileRanks][token][2 * word % kTileRanks];
        sum.x += from[0];
        sum.y += from[1];
      }
      sum.x *= narrow.scale;
      sum.y *= narrow.scale;
      const uint32_t packed = pack_pair<Scalar>(sum.x, sum.y);
      narrow.hidden[row * words + word] = packed;
      reinterpret_cast<uint32_t*>(result.first + row * result.stride + columns)[word] = packed;
    }
  }
};

// Rows are four vectors more than a multiple of eight apart: what four lanes each read of two rows
// lies in different banks.
template <typename Scalar, int kHeld>
struct Shared {
  static constexpr int kPitch = (32 * kHeld + 7) / 8 * 8 + 4;
  uint4 rows[kTokens][kPitch];
  Sums sums;

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
      for (int first = 0; first < 32 * kHeld; first += 4 * kTokens) {
        const int column = first + 4 * warp + lane % 4;
        const bool there = column < shape.columns;
        // what is behind a row is zeros
        add_vector(own, narrow, tile, there ? column : 0,
                   from_words<Scalar>(rows[lane / 4][column]));
      }
      sums.put(tile, own);
    }
    __syncthreads();
    sums.write(narrow, static_cast<int64_t>(blockIdx.x) * kTokens, shape.rows, result,
               shape.columns);
  }
};

template <typename Scalar, int kHeld>
__global__ void __launch_bounds__(32 * kTokens)
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
__global__ void __launch_bounds__(32 * kTokens)
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
    forward_kernel<Scalar, kHeld><<<blocks, 32 * kTokens, 0, stream>>>(
        x, rows_of<Scalar>(a.added, a.added_stride), weight, bias, rows_of<Scalar>(a.sum, a.width),
        result, moments, shape, static_cast<float>(a.eps), narrow);
  } else {
    backward_kernel<Scalar, kHeld><<<blocks, 32 * kTokens, 0, stream>>>(
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
