// A team of threads takes a row and keeps it in registers, so that it is read once: its sums, then
// the result. Rows of up to kOfWarp vectors have a warp, longer ones a block.
//
// In the backward pass a team goes on to further rows and sums the weight's gradient on its way, in
// registers. Blocks leave what they summed, and a second kernel adds that up: on one device every
// sum of one shape has one order.

#include <algorithm>

#include "launch.h"
#include "row_tiles.h"
#include "scale_rows.h"
#include "vectors.h"

namespace eri {
namespace {

constexpr int kThreads = 256;
constexpr int kOfWarp = 160;  // vectors of a row that a warp holds
constexpr int kBlocks = 2;    // of the backward pass, on a multiprocessor at once
constexpr int kAdders = 32;  // threads that add up the parts of one number

struct Shape {
  uint32_t rows;
  int columns;  // vectors of a row
  float share;  // 1 / numbers of a row
  float eps;
  bool norm;
};

// The sums over a team, in each of its threads. All threads of the block have to come here if the
// block is the team.
template <int kTeam>
__device__ __forceinline__ float2 team_sum(float2 value) {
  value = make_float2(warp_sum(value.x), warp_sum(value.y));
  if constexpr (kTeam > 32) {
    __shared__ float2 of_warps[kTeam / 32];
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < kTeam / 32; ++warp) {
      value.x += of_warps[warp].x;
      value.y += of_warps[warp].y;
    }
    __syncthreads();  // the next row's are written to the same place
  }
  return value;
}

// Four numbers of the weight.
template <typename Scalar>
__device__ __forceinline__ void weight_at(const uint4* weight, int column, int quad,
                                          float (&numbers)[4]) {
  if (weight != nullptr) {
    unpack(load<Scalar>(weight + column), quad, numbers);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers[i] = 1.0f;
  }
}

template <typename Scalar, int kHeld, int kTeam>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Rows<const uint4> x, const uint4* __restrict__ weight, Rows<uint4> y,
                   Shape shape) {
  const uint32_t row = blockIdx.x * (kThreads / kTeam) + threadIdx.x / kTeam;
  const int columns = shape.columns;
  if (row >= shape.rows) return;  // never some threads of a team alone
  Vector<Scalar> held[kHeld];
  load_row<Scalar, kHeld, kTeam>(x[row], columns, held);
  float rms = 1.0f;  // its reciprocal
  if (shape.norm) {
    float squares = 0.0f;
    each<Scalar, kHeld, kTeam>(columns, [&](int k, int quad, int) {
      float v[4];
      unpack(held[k], quad, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) squares = fmaf(v[i], v[i], squares);
    });
    squares = team_sum<kTeam>(make_float2(squares, 0.0f)).x;
    rms = rsqrtf(fmaf(squares, shape.share, shape.eps));
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = static_cast<int>(threadIdx.x) % kTeam + kTeam * k;
    if (column >= columns) return;
#pragma unroll
    for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
      float v[4], w[4];
      unpack(held[k], quad, v);
      weight_at<Scalar>(weight, column, quad, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = v[i] * rms * w[i];
      pack(held[k], quad, v);
    }
    store(y[row] + column, held[k]);
  }
}

// What the teams of a block have summed, added up in the order of the teams: a part [width].
template <typename Scalar, int kHeld, int kTeam>
__device__ __forceinline__ void leave_part(const float (&sums)[kHeld][Vector<Scalar>::kSize],
                                           int columns, float4* part) {
  constexpr int kQuads = Vector<Scalar>::kQuads;
  __shared__ float4 of_block[kHeld * kTeam * kQuads];
#pragma unroll 1
  for (int team = 0; team < kThreads / kTeam; ++team) {
    if (static_cast<int>(threadIdx.x) / kTeam == team) {
      each<Scalar, kHeld, kTeam>(columns, [&](int k, int quad, int column) {
        const float* mine = sums[k] + 4 * quad;
        float4 sum = make_float4(mine[0], mine[1], mine[2], mine[3]);
        float4* total = of_block + column * kQuads + quad;
        if (team > 0) {
          sum.x += total->x;
          sum.y += total->y;
          sum.z += total->z;
          sum.w += total->w;
        }
        *total = sum;
      });
    }
    __syncthreads();
  }
  for (int i = static_cast<int>(threadIdx.x); i < columns * kQuads; i += kThreads) {
    part[i] = of_block[i];
  }
}

// With z = x / rms(x) or x, and g = weight * dy: dx = g / rms(x) - z mean(g z) / rms(x), or g; and
// of the weight the sum of dy * z over all rows.
template <typename Scalar, int kHeld, int kTeam, bool kWeight>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(Rows<const uint4> dy, Rows<const uint4> x, const uint4* __restrict__ weight,
                    Rows<uint4> dx, float4* __restrict__ parts, Shape shape) {
  constexpr uint32_t kTeams = kThreads / kTeam;
  const int columns = shape.columns;
  float sums[kHeld][Vector<Scalar>::kSize] = {};
  for (uint32_t row = blockIdx.x * kTeams + threadIdx.x / kTeam; row < shape.rows;
       row += gridDim.x * kTeams) {
    Vector<Scalar> gradients[kHeld], held[kHeld];
    load_row<Scalar, kHeld, kTeam>(dy[row], columns, gradients);
    load_row<Scalar, kHeld, kTeam>(x[row], columns, held);
    float rms = 1.0f, mean = 0.0f;  // 1 / rms(x), and the mean of g z
    if (shape.norm) {
      float2 sum = make_float2(0.0f, 0.0f);
      each<Scalar, kHeld, kTeam>(columns, [&](int k, int quad, int column) {
        float g[4], v[4], w[4];
        unpack(gradients[k], quad, g);
        unpack(held[k], quad, v);
        weight_at<Scalar>(weight, column, quad, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum.x = fmaf(v[i], v[i], sum.x);
          sum.y = fmaf(g[i] * w[i], v[i], sum.y);
        }
      });
      sum = team_sum<kTeam>(sum);
      rms = rsqrtf(fmaf(sum.x, shape.share, shape.eps));
      mean = sum.y * shape.share * rms;
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = static_cast<int>(threadIdx.x) % kTeam + kTeam * k;
      if (column < columns) {
#pragma unroll
        for (int quad = 0; quad < Vector<Scalar>::kQuads; ++quad) {
          float g[4], v[4], w[4];
          unpack(gradients[k], quad, g);
          unpack(held[k], quad, v);
          weight_at<Scalar>(weight, column, quad, w);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float z = v[i] * rms;
            if (kWeight) sums[k][4 * quad + i] = fmaf(g[i], z, sums[k][4 * quad + i]);
            g[i] *= w[i];
            v[i] = shape.norm ? rms * fmaf(-z, mean, g[i]) : g[i];
          }
          pack(held[k], quad, v);
        }
        store(dx[row] + column, held[k]);
      }
    }
  }
  if constexpr (kWeight) {
    float4* part = parts + static_cast<int64_t>(blockIdx.x) * columns * Vector<Scalar>::kQuads;
    leave_part<Scalar, kHeld, kTeam>(sums, columns, part);
  }
}

// A warp reads 32 numbers of every kAdders-th part; then it adds up one of them.
template <typename Scalar>
__global__ void __launch_bounds__(32 * kAdders)
    sum_kernel(const float* __restrict__ parts, Scalar* __restrict__ result, int count, int width) {
  __shared__ float sums[kAdders][33];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first = static_cast<int>(blockIdx.x) * 32;
  float sum = 0.0f;
  if (first + lane < width) {
    for (int part = warp; part < count; part += kAdders) {
      sum += __ldg(parts + static_cast<int64_t>(part) * width + first + lane);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(sums[lane][warp]);
  if (lane == 0 && first + warp < width) result[first + warp] = static_cast<Scalar>(sum);
}

template <typename Scalar, int kHeld, int kTeam>
void launch_held(const ScaleRowsArguments& a, const Shape& shape, cudaStream_t stream) {
  const auto x = rows_of<Scalar>(a.x, a.x_stride);
  const auto dy = rows_of<Scalar>(a.dy, a.dy_stride);
  const auto result = rows_of<Scalar>(a.result, a.width);
  const uint4* weight = static_cast<const uint4*>(a.weight);
  if (a.dy == nullptr) {
    const uint32_t blocks = (shape.rows - 1) / (kThreads / kTeam) + 1;
    forward_kernel<Scalar, kHeld, kTeam>
        <<<blocks, kThreads, 0, stream>>>(x, weight, result, shape);
    return;
  }
  const uint32_t blocks = static_cast<uint32_t>(scale_rows_parts(a));
  float4* parts = reinterpret_cast<float4*>(a.parts);
  if (a.weight_gradient == nullptr) {
    backward_kernel<Scalar, kHeld, kTeam, false>
        <<<blocks, kThreads, 0, stream>>>(dy, x, weight, result, parts, shape);
    return;
  }
  backward_kernel<Scalar, kHeld, kTeam, true>
      <<<blocks, kThreads, 0, stream>>>(dy, x, weight, result, parts, shape);
  const int width = static_cast<int>(a.width);
  sum_kernel<Scalar><<<(width + 31) / 32, 32 * kAdders, 0, stream>>>(
      a.parts, static_cast<Scalar*>(a.weight_gradient), static_cast<int>(blocks), width);
}

template <typename Scalar>
void launch(const ScaleRowsArguments& a, cudaStream_t stream) {
  static_assert(kOfWarp == 5 * 32 && kScaleRowsVectors == 4 * kThreads);
  const int columns = static_cast<int>(a.width / Vector<Scalar>::kSize);
  const Shape shape = {static_cast<uint32_t>(a.rows), columns, 1.0f / static_cast<float>(a.width),
                       static_cast<float>(a.eps), a.norm};
  if (columns <= 32) {
    launch_held<Scalar, 1, 32>(a, shape, stream);
  } else if (columns <= 96) {
    launch_held<Scalar, 3, 32>(a, shape, stream);
  } else if (columns <= kOfWarp) {
    launch_held<Scalar, 5, 32>(a, shape, stream);
  } else if (columns <= kThreads) {
    launch_held<Scalar, 1, kThreads>(a, shape, stream);
  } else if (columns <= 2 * kThreads) {
    launch_held<Scalar, 2, kThreads>(a, shape, stream);
  } else {
    launch_held<Scalar, 4, kThreads>(a, shape, stream);
  }
}

}  // namespace

int64_t scale_rows_parts(const ScaleRowsArguments& a) {
  const int64_t at_once = a.width <= kOfWarp * vector_size(a.type) ? kThreads / 32 : 1;
  const int64_t most = kBlocks * static_cast<int64_t>(multiprocessors());
  return std::min(most, (a.rows + at_once - 1) / at_once);
}

const char* launch_scale_rows(const ScaleRowsArguments& a, void* stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&]<typename Scalar>() {
    launch<Scalar>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace eri
