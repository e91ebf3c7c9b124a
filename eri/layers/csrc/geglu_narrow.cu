// One pass over rows of values and gates, which makes the narrow product of what it writes on the
// way. Lanes (g, t) of a warp take vectors of row g of eight, as the product wants them. A block
// takes 32 rows: the ranks are as many bytes as some rows, and four warps that take other rows of
// the same columns find them in the cache of their processor. The arithmetic is that of geglu.cu.

#include "geglu.h"
#include "launch.h"
#include "narrow.h"
#include "normal.h"

namespace eri {
namespace {

constexpr int kSteps = 2;           // vectors of a lane that are on their way at once
constexpr int kReach = 4 * kSteps;  // vectors of a row that a warp takes in turn
constexpr int kRows = 4;            // eights of rows of a block
constexpr int kParts = 4;           // warps that share the columns of a row
constexpr int kThreads = 32 * kRows * kParts;
constexpr int kBlockRows = kRows * kTokens;

struct Shape {
  uint32_t rows;
  int columns;  // vectors of a, and of one half of u
};

// Of a lane: its row, whether that is there, and its first column in each turn.
struct Lane {
  int rows, part;  // of its warp
  uint32_t row;
  bool there;
  int column;
};

__device__ __forceinline__ Lane lane_of(const Shape& shape) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = warp % kRows, part = warp / kRows;
  const uint32_t row = blockIdx.x * kBlockRows + rows * kTokens + lane / 4;
  return {rows, part, min(row, shape.rows - 1), row < shape.rows, part * kReach + lane % 4};
}

template <typename Scalar, int kTiles>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(Rows<const uint4> u, Rows<uint4> a, Shape shape, const Narrow<Scalar> narrow) {
  __shared__ Sums<kTiles, kParts, kRows> shared;
  const Lane lane = lane_of(shape);
  const uint4* from = u[lane.row];
  float sums[kTiles][4] = {};
  for (int first = lane.column; first - lane.column % 4 < shape.columns;
       first += kReach * kParts) {
    Vector<Scalar> values[kSteps], gates[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = first + 4 * k;
      if (column < shape.columns) {
        values[k] = load_last<Scalar>(from + column);
        gates[k] = load_last<Scalar>(from + shape.columns + column);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = first + 4 * k;
      const bool there = column < shape.columns;
      Vector<Scalar> result = zeros<Scalar>();
      if (there) {
#pragma unroll
        for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
          float v[4], g[4];
          unpack(values[k], quad, v);
          unpack(gates[k], quad, g);
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] *= g[i] * normal<Scalar>(g[i]).cdf;
          pack(result, quad, v);
        }
        if (lane.there) store(a[lane.row] + column, result);
      }
      __syncwarp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add_vector(sums[tile], narrow, tile, there ? column : 0, result);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) shared.put(lane.part, lane.rows, tile, sums[tile]);
  __syncthreads();
  shared.write(narrow, static_cast<int64_t>(blockIdx.x) * kBlockRows, shape.rows, a, shape.columns);
}

template <typename Scalar, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(Rows<const uint4> da, Rows<const uint4> u, Rows<uint4> du, Rows<uint4> a,
                    Shape shape, const Narrow<Scalar> narrow) {
  __shared__ Sums<kTiles, kParts, kRows> shared;
  const Lane lane = lane_of(shape);
  const uint4* from = u[lane.row];
  const uint4* gradient = da[lane.row];
  uint4* to = du[lane.row];
  float sums[kTiles][4] = {};
  for (int first = lane.column; first - lane.column % 4 < shape.columns;
       first += kReach * kParts) {
    Vector<Scalar> gradients[kSteps], values[kSteps], gates[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = first + 4 * k;
      if (column < shape.columns) {
        gradients[k] = load_last<Scalar>(gradient + column);
        values[k] = load_last<Scalar>(from + column);
        gates[k] = load_last<Scalar>(from + shape.columns + column);
      }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int column = first + 4 * k;
      const bool there = column < shape.columns;
      Vector<Scalar> to_value = zeros<Scalar>(), to_gate = zeros<Scalar>();
      if (there) {
        Vector<Scalar> again;
#pragma unroll
        for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
          float d[4], v[4], g[4], r[4];
          unpack(gradients[k], quad, d);
          unpack(values[k], quad, v);
          unpack(gates[k], quad, g);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Normal at = normal<Scalar>(g[i]);
            r[i] = v[i] * (g[i] * at.cdf);
            v[i] *= d[i] * fmaf(g[i], at.density, at.cdf);
            d[i] *= g[i] * at.cdf;
          }
          pack(again, quad, r);
          pack(to_value, quad, d);
          pack(to_gate, quad, v);
        }
        if (lane.there) {
          store(to + column, to_value);
          store(to + shape.columns + column, to_gate);
          store(a[lane.row] + column, again);
        }
      }
      __syncwarp();
      const int place = there ? column : 0;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        add_vector(sums[tile], narrow, tile, place, to_value);
        add_vector(sums[tile], narrow, tile, shape.columns + place, to_gate);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) shared.put(lane.part, lane.rows, tile, sums[tile]);
  __syncthreads();
  shared.write(narrow, static_cast<int64_t>(blockIdx.x) * kBlockRows, shape.rows, du,
               2 * shape.columns);
}

template <typename Scalar, int kTiles>
void launch_tiles(const GegluArguments& a, cudaStream_t stream) {
  const Shape shape = {static_cast<uint32_t>(a.rows),
                       static_cast<int>(a.width / Vector<Scalar>::kSize)};
  const uint32_t blocks = (shape.rows + kBlockRows - 1) / kBlockRows;
  const Narrow<Scalar> narrow = narrow_of<Scalar>(a.narrow);
  const auto u = rows_of<Scalar>(a.u, a.u_stride);
  const auto da = rows_of<Scalar>(a.da, a.da_stride);
  const auto result = rows_of<Scalar>(a.result, a.result_stride);
  if (a.da == nullptr) {
    forward_kernel<Scalar, kTiles><<<blocks, kThreads, 0, stream>>>(u, result, shape, narrow);
  } else {
    const auto again = rows_of<Scalar>(a.again, a.width);
    backward_kernel<Scalar, kTiles>
        <<<blocks, kThreads, 0, stream>>>(da, u, result, again, shape, narrow);
  }
}

template <typename Scalar>
void launch(const GegluArguments& a, cudaStream_t stream) {
  if (a.narrow.ranks <= kTileRanks) {
    launch_tiles<Scalar, 1>(a, stream);
  } else if (a.narrow.ranks <= 2 * kTileRanks) {
    launch_tiles<Scalar, 2>(a, stream);
  } else {
    launch_tiles<Scalar, 3>(a, stream);
  }
}

}  // namespace

const char* launch_geglu_narrow(const GegluArguments& arguments, void* stream) {
  return with_half_type(arguments.type, [&]<typename Scalar>() {
    launch<Scalar>(arguments, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace eri
